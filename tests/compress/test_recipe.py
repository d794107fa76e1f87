"""One recipe on a calibration loop and on a training loop: score, then sparsify, then finalize."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compress_models import Mlp, batches
from omegaconf import OmegaConf
from torch import Tensor, nn

from flex_model import FlexModel
from flex_model.compress import Lifecycle, Modifier, ScoreModifier, SparsifyModifier, modifiers_of
from flex_model.errors import CompressionError
from flex_model.importance import L2NormHook, load_scores
from flex_model.sparsity import ActivationSparsifier

RECIPE = """
- score: {layers: ["*down"], hook: L2NormHook, arguments: {sequence_dim: 1}, start: 0, end: 3,
          folder: "FOLDER/scores"}
- sparsify: {layers: [down], start: 3, end: 5, folder: "FOLDER/masks",
             aggregate: "compress_models:add", reduce: "compress_models:mean_of_tokens",
             mask: "compress_models:above", config: {threshold: 1.8}}
"""


def _inner(x: Tensor) -> Tensor:
    model = Mlp()
    return torch.relu(model.up(x)).detach()


def _due_mask(seen: list[Tensor]) -> Tensor:
    total = torch.stack([_inner(x) for x in seen]).sum(0)
    return (total.mean((0, 1)).abs() >= 1.8).float()


def _recipe(folder: Path) -> list[Modifier]:
    return modifiers_of(OmegaConf.create(RECIPE.replace("FOLDER", str(folder))))


def _checked(folder: Path, modifiers: list[Modifier], given: list[Tensor]) -> None:
    score, sparsify = modifiers
    assert isinstance(score, ScoreModifier)
    assert isinstance(sparsify, SparsifyModifier)
    hook = L2NormHook(1)
    for x in given[:3]:
        hook(nn.Identity(), (_inner(x),), None)
    torch.testing.assert_close(score.scores["down"]["score"], hook.accumulate())
    assert torch.equal(
        load_scores(folder / "scores")["down"]["score"], score.scores["down"]["score"]
    )
    mask = sparsify.sparsifier.get_mask("down")
    assert torch.equal(mask, _due_mask(given[3:5]))  # type: ignore[arg-type]
    assert 0 < mask.sum() < mask.numel()  # type: ignore[union-attr]
    again = ActivationSparsifier(Mlp())
    again.load(folder / "masks")
    assert torch.equal(again.get_mask("down"), mask)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_calibration_loop(tmp_path: Path, wrapped: bool) -> None:
    """Exactly three batches are scored, two aggregated; from the sixth on inputs are sparse."""
    given = batches(7)
    model: nn.Module = FlexModel(Mlp(), {}) if wrapped else Mlp()
    modifiers = _recipe(tmp_path)
    lifecycle = Lifecycle(modifiers)
    lifecycle.initialize(model=model)
    outputs = []
    for x in given:
        lifecycle.event("batch_start", batch_data=x)
        with torch.no_grad():
            outputs.append(model(x))
        lifecycle.event("batch_end")
    lifecycle.finalize()
    _checked(tmp_path, modifiers, given)
    plain = Mlp()
    for number, (x, out) in enumerate(zip(given, outputs, strict=True)):
        inner = _inner(x) * (_due_mask(given[3:5]) if number >= 5 else 1.0)
        torch.testing.assert_close(out, plain.down(inner).detach())
    assert torch.equal(model(given[0]), plain(given[0])), "finalized: no hook is left"


def test_a_training_loop(tmp_path: Path) -> None:
    """The same recipe, with all events of a batch; the frozen weights let the truth stay simple."""
    given = batches(7)
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    modifiers = _recipe(tmp_path)
    lifecycle = Lifecycle(modifiers)
    lifecycle.initialize(model=model, optimizer=optimizer)
    assert lifecycle.state.compression_ready
    for x in given:
        lifecycle.event("batch_start", batch_data=x)
        loss = model(x).square().mean()
        lifecycle.event("loss_calculated", loss=loss)
        loss.backward()
        lifecycle.event("optim_pre_step")
        optimizer.step()
        lifecycle.event("optim_post_step")
        lifecycle.event("batch_end")
    lifecycle.finalize()
    assert lifecycle.global_step == 7
    _checked(tmp_path, modifiers, given)
    assert not model.down._forward_pre_hooks


def test_a_calibration_without_batches_events(tmp_path: Path) -> None:
    """calibration start and end alone drive the same modifiers."""
    given = batches(3)
    score = ScoreModifier(layers=["down"], arguments={"sequence_dim": 1})
    model = Mlp()
    lifecycle = Lifecycle([score])
    lifecycle.initialize(model=model)
    lifecycle.event("calibration_start")
    for x in given:
        model(x)
    lifecycle.event("calibration_end")
    model(given[0])
    lifecycle.finalize()
    hook = L2NormHook(1)
    for x in given:
        hook(nn.Identity(), (_inner(x),), None)
    torch.testing.assert_close(score.scores["down"]["score"], hook.accumulate())


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ([{"scrore": {}}], "scrore"),
        ([{"score": {"layers": ["down"], "ends": 3}}], "ends"),
        ([{"score": {}}], "layers"),
        ([{"score": {}, "sparsify": {}}], "one"),
        ({"score": {}}, "list"),
        ([{"sparsify": {"layers": ["a"], "aggregate": "no.module:f"}}], "no.module"),
        ("/no/such/recipe.yaml", "cannot be read"),
    ],
)
def test_recipes_that_make_no_sense(recipe: Any, named: str) -> None:
    with pytest.raises(CompressionError, match=named):
        modifiers_of(recipe)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"layers": ["nowhere"]}, "nowhere"),
        ({"layers": ["down"], "hook": "NoHook"}, "NoHook"),
        ({"layers": ["down"], "arguments": {"wrong": 1}}, "wrong"),
    ],
)
def test_recipes_that_do_not_fit_the_model(fields: dict[str, Any], named: str) -> None:
    """All is refused as the run begins, and the model is as it was."""
    model = Mlp()
    first = ScoreModifier(layers=["up"], start=0)
    lifecycle = Lifecycle([first, *modifiers_of([{"score": fields}])])
    with pytest.raises(CompressionError, match=named):
        lifecycle.initialize(model=model)
    assert not model.up._forward_pre_hooks
    assert not first.initialized
