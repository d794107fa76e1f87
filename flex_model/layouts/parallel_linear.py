"""Column-, row- and vocabulary-parallel layers, as fairscale and Megatron share them.

Both frameworks state in the module's fields what its forward does with the parallel dim, and both
wrap their regions so that a replicated input's gradient comes back summed. What differs (sequence
parallelism, biases that are returned) is handed in.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from flex_model.layouts.sources import Side, Told

__all__ = ["WHOLE", "sharded", "tell_column", "tell_row"]

WHOLE = Told(Replicate(), Replicate())


def sharded(placement: Placement) -> Told:
    """A shard's gradient is the same shard of the gradient."""
    return Told(placement, placement)


def tell_column(module: nn.Module, side: Side, ndim: int) -> Told:
    """Input whole (its gradient summed by the layer), output cut by features, or gathered."""
    if side == "input" or module.gather_output:
        return WHOLE
    return sharded(Shard(ndim - 1))


def tell_row(module: nn.Module, side: Side, ndim: int) -> Told:
    """Input cut along the features (or whole and cut inside), output summed."""
    if side == "input" and module.input_is_parallel:
        return sharded(Shard(ndim - 1))
    return WHOLE
