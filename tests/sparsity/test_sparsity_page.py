"""The example on the page of sparsity, run as it stands."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from sparse_models import Mlp, batches

PAGE = Path(__file__).parents[2] / "docs" / "sparsity.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page that tells of another library than this one."""
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # where its functions are found by name
    page.__dict__.update(model=Mlp(), batches=batches(4, 4), folder=tmp_path)
    exec(found[1], page.__dict__)
    assert page.sparsifier.get_mask("down").shape == (8,)
    assert (tmp_path / "sparsifier.json").exists()
