"""What an activation is on this rank: pure arithmetic over placements, no communication.

An activation is described per mesh dim by torch's own placements: ``Shard(dim)``, ``Replicate()``,
``Partial()``, and ``_StridedShard(dim, split_factor=k)`` for a dim that is sharded *inside* ``k``
outer blocks (tokens flattened as ``[sequence, batch]`` with the batch sharded, or a fused
``[gate | up]`` projection). One fact stands beside the usual ones: the placement of the value and
that of its **gradient** are kept apart, because they differ. A rotary table is the same on every
tensor-parallel rank, yet each rank computes only its heads' term of its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

__all__ = ["ActivationLayout", "DimLayout", "block_count", "is_sharded", "replicated", "shard_dim"]


def is_sharded(placement: Placement | None) -> bool:
    """Whether a rank holds only a slice (a strided one too)."""
    return isinstance(placement, (Shard, _StridedShard))


def shard_dim(placement: Placement) -> int:
    """The tensor dim that a sharded placement cuts."""
    return placement.dim  # type: ignore[attr-defined]


def block_count(placement: Placement) -> int:
    """Outer blocks that the sharded dim consists of: 1 for ``Shard``, k for ``_StridedShard``."""
    return int(placement.split_factor) if isinstance(placement, _StridedShard) else 1


@dataclass(frozen=True)
class DimLayout:
    """How an activation lies over one mesh dim.

    Attributes:
        name: the mesh dim ("dp", "tp", ...).
        size: ranks along it.
        value: placement of the value.
        gradient: placement of the gradient that autograd brings here; None where nothing tells it
            (it is then measured in the first backward).
        shard_sizes: length of every rank's shard along the sharded dim, counted within one outer
            block; None when all are equal.
        value_scale: factor from the assembled local values to the whole value.
        gradient_scale: the same for gradients: 1/D over D data-parallel ranks whose losses are
            averaged, else 1.
        zigzag: whether rank r of C holds chunks r and 2C-1-r of the sharded dim's 2C equal ones, as
            context-parallel ranks do to share out causal attention evenly. torch's placements have
            no word for it, so they tell the dim, and this the order.
    """

    name: str
    size: int
    value: Placement | None
    gradient: Placement | None
    shard_sizes: tuple[int, ...] | None = None
    value_scale: float = 1.0
    gradient_scale: float = 1.0
    zigzag: bool = False

    @property
    def told(self) -> bool:
        """Whether both placements are known."""
        return self.value is not None and self.gradient is not None

    @property
    def moves_value(self) -> bool:
        """Whether assembling the value needs the other ranks."""
        return not isinstance(self.value, Replicate)

    @property
    def trivial(self) -> bool:
        """Whether gather and re-shard are the identity here, forward and backward."""
        return isinstance(self.value, Replicate) and isinstance(self.gradient, Replicate)

    def transposed(self) -> DimLayout:
        """The layout of the gradient, seen as an activation of its own."""
        return replace(
            self,
            value=self.gradient,
            gradient=self.value,
            value_scale=self.gradient_scale,
            gradient_scale=self.value_scale,
        )

    def on(self, dim: int) -> DimLayout:
        """The same cut, of a dim of another tensor: a per-channel weight, say."""
        blocks = block_count(self.value) if self.value is not None else 1
        moved = Shard(dim) if blocks == 1 else _StridedShard(dim, split_factor=blocks)
        return replace(self, value=moved, gradient=moved, value_scale=1.0, gradient_scale=1.0)

    def whole_length(self, local_length: int) -> int:
        """Whole length of the sharded tensor dim, from this rank's local length."""
        if not is_sharded(self.value):
            return local_length
        if self.shard_sizes is None:
            return local_length * self.size
        return block_count(self.value) * sum(self.shard_sizes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ActivationLayout:
    """How one activation lies over the mesh: one `DimLayout` per mesh dim, outermost first.

    Assembling goes from the last mesh dim to the first (tp, then dp), re-sharding the other way.
    """

    dims: tuple[DimLayout, ...] = ()

    @cached_property
    def trivial(self) -> bool:
        """Every rank holds the whole value and the whole gradient."""
        return all(dim.trivial for dim in self.dims)

    @cached_property
    def moves_value(self) -> bool:
        """Whether assembling the value needs any other rank."""
        return any(dim.moves_value for dim in self.dims)

    @cached_property
    def told(self) -> bool:
        """Whether all placements, of value and gradient, are known."""
        return all(dim.told for dim in self.dims)

    def transposed(self) -> ActivationLayout:
        """The layout of the activation's gradient."""
        return ActivationLayout(tuple(dim.transposed() for dim in self.dims))

    def whole_shape(self, local_shape: torch.Size | tuple[int, ...]) -> torch.Size:
        """Shape of the whole tensor, from this rank's local shape.

        Args:
            local_shape: sizes of the shard on this rank.

        Returns:
            Sizes of the assembled tensor; equal to ``local_shape`` on unsharded dims.
        """
        shape = list(local_shape)
        for dim in reversed(self.dims):
            if is_sharded(dim.value):
                at = shard_dim(dim.value)  # type: ignore[arg-type]
                shape[at] = dim.whole_length(shape[at])
        return torch.Size(shape)

    def describe(self) -> str:
        """One line for error messages: ``dp: Shard(0), tp: Replicate (gradient Partial(sum))``."""
        parts = []
        for dim in self.dims:
            text = f"{dim.name}({dim.size}): {dim.value}"
            if dim.zigzag and is_sharded(dim.value):
                text += " in zig-zag order"
            if dim.gradient is None:
                text += " (gradient not told)"
            elif type(dim.gradient) is not type(dim.value):
                text += f" (gradient {dim.gradient})"
            parts.append(text)
        return ", ".join(parts) or "one process"


def replicated(name: str, size: int) -> DimLayout:
    """A mesh dim over which value and gradient are whole on every rank."""
    return DimLayout(name, size, Replicate(), Replicate())


def gradient_of(value: Placement | None) -> Placement | None:
    """The gradient's placement where the value's decides it: a shard's is the same shard's, and
    every term of a sum receives the whole gradient. A replicated value decides nothing.
    """
    if value is None or isinstance(value, Replicate):
        return None
    return Replicate() if isinstance(value, Partial) else value
