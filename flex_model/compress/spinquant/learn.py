"""Learning R1 and R2 on calibration batches, from where they are (SpinQuant, sec. 3.2).

A rotated model is rotated further, by matrices that start at one and stay orthogonal: each is
Cayley's map of a skew-symmetric one (`torch.nn.utils.parametrizations.orthogonal`), so that Adam
on the latter moves on the Stiefel manifold. The result is fused as any rotation is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import orthogonal

from flex_model.compress.spinquant.orthogonal import Dense
from flex_model.compress.spinquant.plan import Turns, turning_steps
from flex_model.compress.spinquant.rotate import Rotations
from flex_model.compress.spinquant.steps import Step
from flex_model.errors import CompressionError

__all__ = ["learn", "next_token_loss"]

Loss = Callable[[Any, Tensor], Tensor]


def next_token_loss(output: Any, ids: Tensor) -> Tensor:
    """Mean cross-entropy of each next token.

    Args:
        output: a model's, with ``logits`` ``[batch, sequence, vocabulary]``.
        ids: that it was called on, ``[batch, sequence]``.
    """
    logits = output.logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def learn(
    rotations: Rotations,
    batches: Iterable[Tensor],
    *,
    steps: int = 100,
    learning_rate: float = 1e-2,
    bits: int = 4,
    loss: Loss = next_token_loss,
) -> list[float]:
    """Rotate a rotated model further, so that it loses less when its weights are rounded.

    What is lowered is ``loss`` of the model with the weights of its layers (not of embedding and
    head) rounded to ``bits`` bits by the largest of each output channel; gradients pass the
    rounding straight through.

    Args:
        rotations: of a model that this process holds whole, with R1 or R2 in them.
        batches: token ids, ``[batch, sequence]`` each, taken in turn.
        steps: of Adam.
        learning_rate: of the skew-symmetric matrices.
        bits: of the rounded weights.
        loss: of the model's output and a batch.

    Returns:
        The loss before each step. Outputs of the unrounded model stay.

    Raises:
        CompressionError: nothing can be learned: no batch, no rotation, or a sharded model.
    """
    batches = list(batches)
    _check(rotations, batches)
    root = rotations.model.root
    learned = _Learned(rotations)
    optimizer = torch.optim.Adam(learned.parameters(), lr=learning_rate)
    quantized = {f"{name}.weight" for name in _rounded_layers(rotations)}
    losses = []
    for number in range(steps):
        ids = batches[number % len(batches)]
        weights = _applied(rotations, learned.steps(), quantized, bits)
        value = loss(functional_call(root, weights, (), {"input_ids": ids}), ids)
        if not torch.isfinite(value):
            raise CompressionError(f"The loss is {value.item()} at step {number}.")
        leaves = list(learned.parameters())
        for leaf, gradient in zip(leaves, torch.autograd.grad(value, leaves), strict=True):
            leaf.grad = gradient
        optimizer.step()
        losses.append(value.item())
    with torch.no_grad():
        rotations.write(learned.steps())
    return losses


class _Learned(nn.Module):
    """The further matrices: R1's, and one R2 for each layer."""

    def __init__(self, rotations: Rotations) -> None:
        super().__init__()
        self._model = [rotations.model]  # not a submodule
        device = next(rotations.model.root.parameters()).device
        turns = rotations.turns
        self.r1 = None if turns.r1 is None else _from_one(turns.r1.size, device)
        self._places = list(turns.r2)
        self.r2 = nn.ModuleList(_from_one(turns.r2[name].size, device) for name in self._places)

    def steps(self) -> Mapping[str, Sequence[Step]]:
        r1 = None if self.r1 is None else _dense(self.r1)
        r2 = {name: _dense(m) for name, m in zip(self._places, self.r2, strict=True)}
        return turning_steps(self._model[0], Turns(r1, r2, {}, {}))


def _from_one(size: int, device: torch.device) -> nn.Module:
    layer = nn.Linear(size, size, bias=False, device=device, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(size))
    return orthogonal(layer, orthogonal_map="cayley")


def _dense(layer: Any) -> Dense:
    return Dense(layer.weight)


def _applied(
    rotations: Rotations, steps: Mapping[str, Sequence[Step]], rounded: set[str], bits: int
) -> dict[str, Tensor]:
    """The parameters that change, by the names that torch gives them."""
    parameters = dict(rotations.model.root.named_parameters())
    found = {name: parameters[name].detach() for name in {*steps, *rounded}}
    for name, own in steps.items():
        for step in own:
            found[name], _ = step.apply(found[name], None)
    return {name: _rounded(t, bits) if name in rounded else t for name, t in found.items()}


def _rounded(weight: Tensor, bits: int) -> Tensor:
    """Rounded to the nearest of 2^bits - 1 values in each row; the gradient is passed through."""
    most = 2 ** (bits - 1) - 1
    scale = weight.detach().abs().amax(1, keepdim=True).clamp_min(1e-12) / most
    nearest = (weight / scale).round().clamp(-most, most) * scale
    return weight + (nearest - weight).detach()


def _rounded_layers(rotations: Rotations) -> list[str]:
    model = rotations.model
    head = model.found["lm_head"]
    return [name for name in (*model.readers, *model.writers) if name not in head]


def _check(rotations: Rotations, batches: Sequence[Tensor]) -> None:
    if not batches:
        raise CompressionError("Rotations are learned on calibration batches: give at least one.")
    if rotations.turns.r1 is None and not rotations.turns.r2:
        raise CompressionError("R1 and R2 can be learned, but the model has neither.")
    model = rotations.model
    if any(cut for name in model.found["mlp_out"] for cut in model.weight(name).cuts):
        raise CompressionError(
            "Rotations are learned on a model that one process holds whole. Learn there, save its "
            "weights, and shard those."
        )
