"""The reference's own cases: aggregates, masks, what layers receive, outputs, hook states."""

from typing import Any

import pytest
import torch
from golden_sparsifier import CASES, INDEX, replay, tensors


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_golden(case: dict[str, Any]) -> None:
    """Catches any difference from torch's own, within the tolerance that the cases name."""
    due = {k: v for k, v in tensors(case).items() if k.split(".")[0] not in ("model", "input")}
    found, sparsifier = replay(case)
    assert sorted(found) == sorted(due)
    for key, value in due.items():
        assert found[key].dtype == value.dtype, key
        torch.testing.assert_close(found[key], value, msg=key, **INDEX["tolerance"])
    for name, hook_state in case["hook_state"].items():
        group = sparsifier.data_groups[name]
        assert group["sparse_config"] == case["sparse_config"][name]
        # torch calls a layer "sparsify" after squash_mask(False), and reloading attaches the hook.
        attached = ["squash", False] not in case["script"]
        assert group["hook_state"] == (hook_state if attached else "None")


def test_there_are_thirteen() -> None:
    assert len(CASES) == 13
