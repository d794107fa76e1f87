"""On a model that was really trained: rounded to 4 bits it loses less rotated than not."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import byte_llama
from byte_llama import Recipe, text_bytes
from flex_model.compress import Lifecycle
from flex_model.compress.spinquant import SpinQuantModifier, learn, rotate
from flex_model.pruning import perplexity
from rounding import quantized

# A quarter of a minute's training; the documentation has the figures of the whole model.
SMALL = Recipe(
    hidden=64, intermediate=256, layers=2, heads=4, key_value_heads=2, context=128, steps=120
)
WINDOW = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return byte_llama.byte_llama(tmp_path_factory.mktemp("trained"), SMALL)


@pytest.fixture
def model(folder: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _batches(text: Tensor, count: int) -> list[Tensor]:
    return list(text[: count * 8 * WINDOW].view(-1, WINDOW).split(8))


def test_rounded_weights_and_activations_lose_less(model: Any) -> None:
    """Catches rotations that leave the outputs but spread nothing."""
    batches = _batches(text_bytes()[1], 6)
    exact = perplexity(model, batches)
    with quantized(model, 4, 4):
        plain = perplexity(model, batches)
    rotate(model, rotations=("R1", "R2", "R4"))
    assert perplexity(model, batches) == pytest.approx(exact, rel=1e-5)
    with quantized(model, 4, 4):
        rotated = perplexity(model, batches)
    assert exact < rotated < plain
    assert rotated - exact < 0.8 * (plain - exact)


def test_learned_rotations(model: Any) -> None:
    """Catches learning that changes the model's outputs, or that does not lower its loss."""
    train, validation = text_bytes()
    calibration, batches = _batches(train, 2), _batches(validation, 4)
    exact = perplexity(model, batches)
    rotations = rotate(model, rotations=("R1", "R2"), transform_type="random-hadamard")
    with quantized(model, 3):
        before = perplexity(model, calibration)
    # On batches taken in turn, so of two, the loss of every second step is that of one batch.
    losses = learn(rotations, calibration, steps=40, learning_rate=3e-3, bits=3)
    assert losses[-2] < losses[0]
    assert losses[-1] < losses[1]
    assert perplexity(model, batches) == pytest.approx(exact, rel=1e-5)
    with quantized(model, 3):
        assert perplexity(model, calibration) < before
    assert all(parameter.grad is None for parameter in model.parameters())
    rotations.undo()
    assert perplexity(model, batches) == pytest.approx(exact, rel=1e-5)


def test_the_modifier_takes_a_state(model: Any) -> None:
    """Catches fields that do not reach the rotation."""
    train, validation = text_bytes()
    batches = _batches(validation, 2)
    exact = perplexity(model, batches)
    modifier = SpinQuantModifier(
        rotations=["r1", "R2", "R3"],
        transform_type="random-hadamard",
        randomize=True,
        learnable=True,
        learning_steps=2,
        transform_block_size=16,
        precision=torch.float32,
    )
    lifecycle = Lifecycle([modifier])
    lifecycle.initialize(model=model, calib_data=_batches(train, 1))
    lifecycle.finalize()
    rotations = modifier.rotated
    assert rotations.turns.r1 is not None
    assert rotations.turns.r1.size == 16
    assert len(rotations.turns.r2) == len(rotations.turns.r3) == 2
    assert not rotations.turns.r4
    assert perplexity(model, batches) == pytest.approx(exact, rel=1e-5)
    modifier.undo()
    assert perplexity(model, batches) == pytest.approx(exact, rel=1e-5)
