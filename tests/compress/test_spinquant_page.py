"""The example on the page of rotations, run as it stands."""

import re
from pathlib import Path

import pytest
from spin_models import build, ids

PAGE = Path(__file__).parents[2] / "docs" / "rotations.md"


def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a page that tells of another library than this one."""
    build().save_pretrained(tmp_path)
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found
    exec(found[1], {"folder": tmp_path, "ids": ids(), "calibration": [ids()]})
    told = re.search(r"tensor\(([^,)]+)", capsys.readouterr().out)
    assert told
    assert float(told[1]) < 1e-5
