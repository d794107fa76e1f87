"""The example on the page of pruning, run as it stands."""

import re
from pathlib import Path

import pytest
from pruned_models import build, ids

from flex_model.pruning import perplexity

PAGE = Path(__file__).parents[2] / "docs" / "pruning.md"


def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a page that tells of another library than this one."""
    build("llama").save_pretrained(tmp_path / "model")
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found
    names = {
        "folder": tmp_path / "model",
        "calibration": ids(),
        "batches": [ids()],
        "smaller": tmp_path / "smaller",
    }
    exec(found[1], names)
    told = capsys.readouterr().out
    assert f"{perplexity(names['model'], [ids()]):.4g}" in told  # type: ignore[arg-type]
    assert "config: intermediate_size = 33" in told
    assert (tmp_path / "smaller" / "model.safetensors").exists()
