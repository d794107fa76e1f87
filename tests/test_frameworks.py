"""The grid's models, without this library: sharded, they compute what one process computes."""

import pytest

from flex_model.testing.grid import measure_bare
from frameworks.rows import ROW_NAMES, row


@pytest.mark.parametrize("name", ROW_NAMES)
def test_sharded_and_whole_compute_the_same(name):
    errors = measure_bare(row(name))
    assert all(error <= 1e-5 for error in errors.values()), errors
