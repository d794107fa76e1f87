"""The example on the page runs as it stands there."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from flex_model.importance import load_scores

PAGE = Path(__file__).parents[2] / "docs" / "importance.md"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"up": nn.Linear(5, 7), "down_proj": nn.Linear(7, 5)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp["down_proj"](torch.relu(self.mlp["up"](x)))


def test_the_example(tmp_path: Path) -> None:
    """Its scores are those of the formula, and lie in its folder."""
    torch.manual_seed(1)
    model = nn.Sequential(Layer(), Layer())
    batches = [torch.randn(2, 3, 5) for _ in range(2)]
    told: dict[str, Any] = {
        "model": model, "batches": batches, "folder": tmp_path, "torch": torch,
    }  # fmt: skip
    code = PAGE.read_text().partition("```python\n")[2].partition("```")[0]
    exec(compile(code, str(PAGE), "exec"), told)
    down = model[0].mlp["down_proj"]
    inner = [torch.relu(model[0].mlp["up"](x)) for x in batches]
    due = down.weight.norm(dim=0) * sum(x.abs().mean((0, 1)) for x in inner)
    torch.testing.assert_close(told["scores"]["0.mlp.down_proj"], due.detach())
    torch.testing.assert_close(load_scores(tmp_path)["0.mlp.down_proj"]["score"], due.detach())
