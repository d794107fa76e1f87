"""The simplest quantization: each output channel's weights rounded to the nearest of a few."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def rounded(weight: Tensor, bits: int = 4) -> Tensor:
    """Symmetric, scaled by the largest of each row."""
    most = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True) / most
    return (weight / scale).round() * scale


def _round_inputs(bits: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Each token's activations likewise."""
    return rounded(args[0].flatten(0, -2), bits).view_as(args[0]), *args[1:]


@contextmanager
@torch.no_grad()
def quantized(model: nn.Module, bits: int = 4, activations: int | None = None) -> Iterator[None]:
    """All linear layers but the head, for as long as this is entered."""
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    before = [layer.weight.clone() for layer in layers]
    handles = []
    for layer in layers:
        layer.weight.copy_(rounded(layer.weight, bits))
        if activations is not None:  # behind the online rotation, which comes first
            hook = lambda m, args: _round_inputs(activations, m, args)  # noqa: E731
            handles.append(layer.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.weight.copy_(weight)
        for handle in handles:
            handle.remove()
