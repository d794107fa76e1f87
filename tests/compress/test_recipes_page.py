"""The example on the page of recipes, run as it stands."""

import re
from pathlib import Path

import pytest
import torch
from compress_models import Mlp, batches

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a page that tells of another library than this one."""
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found
    model = Mlp()
    (x,) = batches(1)
    plain = model(x)
    exec(found[1], {"model": model, "batches": batches(98)})
    assert "torch.Size([8]) torch.Size([8])" in capsys.readouterr().out
    assert torch.equal(model(x), plain)
