"""One recipe on many ranks: scores, masks and outputs of one process given the same batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from compress_models import Mlp, batches
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from flex_model import FlexModel
from flex_model.compress import Lifecycle, modifiers_of
from flex_model.testing.ranks import run_ranks


def _recipe(steps: int, threshold: float = 1.8) -> list[Any]:
    functions = {
        "aggregate": "compress_models:add",
        "reduce": "compress_models:mean_of_tokens",
        "mask": "compress_models:above",
        "config": {"threshold": threshold},
    }
    score = {"layers": ["down"], "arguments": {"sequence_dim": 1}, "start": 0, "end": steps}
    return [
        {"score": score},
        {"sparsify": {"layers": ["down"], "start": steps, "end": 2 * steps, **functions}},
        {"groups": {"groups": ["probes"], "start": steps}},
    ]


def _run(model: Any, given: list[Tensor], steps: int, dp: int = 1) -> dict[str, Any]:
    """The recipe over all but the last of what is given; the last goes through what it made."""
    flex = model if isinstance(model, FlexModel) else FlexModel(model, {})
    flex.create_hook_group("probes", "up")
    lifecycle = Lifecycle(modifiers_of(_recipe(steps, 1.8 * dp)))
    lifecycle.initialize(model=flex)
    score, sparsify, _ = lifecycle.modifiers
    with torch.no_grad():
        for x in given[:-1]:
            lifecycle.event("batch_start")
            flex(x)
            lifecycle.event("batch_end")
        out = flex(given[-1])
        lifecycle.finalize()
        plain = flex(given[-1])
    return {
        "scores": score.scores["down"]["score"],  # type: ignore[attr-defined]
        "mask": sparsify.sparsifier.get_mask("down"),  # type: ignore[attr-defined]
        "out": out,
        "plain": plain,
        "records": torch.tensor(len(flex.output_ptr.get("up", []))),
    }


def _sharded(dp: int, tp: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    model = Mlp()
    if tp > 1:
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    place = mesh.get_local_rank("dp")
    with FlexModel(model, {}, mesh=mesh) as flex:
        return _run(flex, [x.chunk(dp)[place] for x in batches(5)], 2, dp)


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 1), (2, 2), (1, 4)])
def test_a_recipe_on_many_ranks(dp: int, tp: int) -> None:
    """Replicas' batches count as batches of their own for aggregates, as one batch for scores."""
    whole = batches(5)
    scores = _run(Mlp(), whole, 2)["scores"]
    parts = [part for x in whole[:-1] for part in x.chunk(dp)]
    due = _run(Mlp(), [*parts, whole[-1]], 2 * dp, dp)
    assert 0 < due["mask"].sum() < due["mask"].numel()
    for rank, found in enumerate(run_ranks(_sharded, dp * tp, dp, tp)):
        torch.testing.assert_close(found["scores"], scores)
        assert torch.equal(found["mask"], due["mask"])
        for key in ("out", "plain"):
            own = due[key].chunk(dp)[rank // tp]
            torch.testing.assert_close(found[key], own, rtol=1e-5, atol=1e-5)
        assert found["records"] == (4 if rank == 0 else 0), "two steps, and two forwards behind"


def _fails_everywhere(folder: Path) -> str:
    """A step that cannot be, on two ranks: all raise, none waits, and all can begin again."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    with FlexModel(Mlp(), {}, mesh=mesh) as flex, torch.no_grad():
        recipe = _recipe(1)
        recipe[1]["sparsify"]["layers"] = ["nowhere"]
        flex.create_hook_group("probes", "up")
        lifecycle = Lifecycle(modifiers_of(recipe))
        with pytest.raises(ValueError, match="nowhere") as caught:
            lifecycle.initialize(model=flex)
        flex(batches(1)[0])
        lifecycle.initialize(modifiers_of(_recipe(1)))
        lifecycle.event("batch_start")
        flex(batches(1)[0])
        lifecycle.event("batch_end")
        lifecycle.finalize()
        return str(caught.value)


def test_a_failure_on_every_rank(tmp_path: Path) -> None:
    for told in run_ranks(_fails_everywhere, 2, tmp_path):
        assert "ScoreModifier" not in told
        assert "SparsifyModifier 1.on_initialize" in told
