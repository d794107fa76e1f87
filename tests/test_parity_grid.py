"""Every kind of hook on every framework's hook points equals one process."""

import pytest

from flex_model.testing.grid import measure_row
from frameworks.rows import ROW_NAMES, row


@pytest.mark.parametrize("name", ROW_NAMES)
def test_row_equals_one_process(name):
    wrong = [measurement for measurement in measure_row(row(name)) if not measurement.passes]
    assert not wrong, "\n".join(["above the tolerance:", *map(str, wrong)])
