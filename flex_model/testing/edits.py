"""The edits of the parity grid: all but one mix channels and batch, so a lost term shows.

An edit that works element by element would come out right on a shard, too. These roll along the
batch, take a softmax over the whole width, divide by a mean over the whole tensor and pass through
a Linear over the whole width. The one that does not mix says so, and runs on the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from flex_model import LocalShard, elementwise

__all__ = ["PROBE", "Edit", "local_edit", "mixing_edit", "new_probe", "random_edit"]

Edit = Callable[[Any, Tensor, Any, Any], Tensor]

PROBE = "probe"


def new_probe(width: int, seed: int = 21) -> nn.Linear:
    """The trainable module of an edit, with the same values wherever the seed is the same."""
    generator = torch.Generator().manual_seed(seed)
    # Torch's own initialisation would draw from the random stream that the grid watches.
    probe = skip_init(nn.Linear, width, width)
    with torch.no_grad():
        probe.weight.copy_(torch.randn(width, width, generator=generator) * 0.5 * width**-0.5)
        # A bias of order one would drown gradients, which are edited by the same function.
        probe.bias.zero_()
    return probe


def mixing_edit(batch_dim: int) -> Edit:
    """The edit of every column but the random one.

    Args:
        batch_dim: the dim to roll along.
    """

    def edit(module: Any, value: Tensor, save_ctx: Any, modules: Mapping[str, nn.Module]) -> Tensor:
        gate = torch.softmax(value / value.detach().abs().mean(), dim=-1)
        rolled = torch.roll(value, 1, dims=batch_dim)
        mixed: Tensor = value * (1 + gate) + 0.5 * rolled + modules[PROBE](value)
        return mixed

    return edit


def local_edit(batch_dim: int) -> Edit:
    """An edit that declares any shard to suffice, and trains a module besides.

    Args:
        batch_dim: not used: nothing is mixed.
    """

    @elementwise
    def edit(
        module: Any,
        value: Tensor,
        save_ctx: Any,
        modules: Mapping[str, nn.Module],
        *,
        shard: LocalShard | None = None,
    ) -> Tensor:
        weight, bias = modules[PROBE].parameters()
        if shard is None:  # a plain torch hook has the whole
            return value * (1 + bias) + torch.sin(value) * weight[0]
        return value * (1 + shard.take(bias)) + torch.sin(value) * shard.take(weight[0])

    return edit


def random_edit(batch_dim: int) -> Edit:
    """The mixing edit with noise and dropout drawn from torch's own random stream."""
    mix = mixing_edit(batch_dim)

    def edit(module: Any, value: Tensor, save_ctx: Any, modules: Mapping[str, nn.Module]) -> Tensor:
        noise = torch.randn_like(value) * value.detach().abs().mean()
        kept = torch.nn.functional.dropout(value, p=0.25, training=True)
        return mix(module, value, save_ctx, modules) + 0.3 * noise + kept

    return edit
