"""Making an activation whole and cutting it again: two adjoint maps, differentiable.

``gather`` and ``reshard`` are maps of the *one* whole tensor, which every rank of the mesh holds
alike after ``gather``. Read that way each is the other's adjoint: what assembles the value forward
takes the gradient apart backward. Per mesh dim, with v the value's and g the gradient's placement:

=========================  ==================  ====================  =================
v / g                      gather              its backward          reshard, backward
=========================  ==================  ====================  =================
Shard / Shard              all-gather          take the slice        slice, all-gather
Replicate / Replicate      nothing             nothing               nothing, nothing
Replicate / Partial        nothing             whole on coordinate   nothing, all-
                                               0, zeros elsewhere    reduce
Partial / Replicate        all-reduce          nothing               whole on coordi-
                                                                     nate 0, nothing
=========================  ==================  ====================  =================

Over D data-parallel ranks whose losses are averaged, assembling a gradient divides by D and taking
it apart multiplies by D (``DimLayout.gradient_scale``; ``Partial("avg")`` for replicated values).
So it is over context-parallel ranks, each of which takes the loss of its own part of the sequence;
their shards are two chunks each, in zig-zag order (``DimLayout.zigzag``).
A plain ``all_gather`` has no backward at all: this table is what it silently loses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Partial
from torch.distributed.tensor.placement_types import Placement

from flex_model.distributed.collectives import (
    all_gather_along,
    all_reduce_sum,
    gather_along,
    slice_along,
)
from flex_model.distributed.gradients import GradientMemory
from flex_model.distributed.mesh import ParallelMesh
from flex_model.layouts.layout import (
    ActivationLayout,
    DimLayout,
    block_count,
    is_sharded,
    shard_dim,
)

__all__ = ["assemble", "assemble_on", "disassemble", "gather", "reshard"]


def gather(
    shard: Tensor, layout: ActivationLayout, mesh: ParallelMesh, memory: GradientMemory
) -> Tensor:
    """The whole activation on every rank, differentiable.

    Args:
        shard: this rank's local tensor.
        layout: how it lies over the mesh.
        mesh: the job's ranks.
        memory: where gradient placements that nothing told are remembered once measured.

    Returns:
        The whole tensor, of ``layout.whole_shape(shard.shape)``; never an alias of ``shard``, so
        that an edit may work in place.
    """
    if layout.trivial:
        return shard.clone()
    return _Gather.apply(shard, layout, mesh, memory)


def reshard(
    whole: Tensor, layout: ActivationLayout, mesh: ParallelMesh, memory: GradientMemory
) -> Tensor:
    """This rank's local tensor of a whole one: `gather`'s adjoint and inverse."""
    if layout.trivial:
        return whole
    return _Reshard.apply(whole, layout, mesh, memory)


def assemble(local: Tensor, layout: ActivationLayout, mesh: ParallelMesh) -> Tensor:
    """The whole value on every rank, without autograd: what must move, moves once."""
    for dim in reversed(layout.dims):
        local = _assemble_dim(local, dim, mesh)
    return local


def disassemble(whole: Tensor, layout: ActivationLayout, mesh: ParallelMesh) -> Tensor:
    """This rank's local value of a whole tensor, without autograd or communication."""
    for dim in layout.dims:
        whole = _disassemble_dim(whole, dim, mesh)
    return whole


def assemble_on(
    local: Tensor, layout: ActivationLayout, mesh: ParallelMesh, rank: int
) -> Tensor | None:
    """The whole value on global rank ``rank`` alone, None elsewhere.

    Only the ranks whose part is needed take part, along one mesh dim after the other.
    """
    for dim in reversed(layout.dims):
        if not dim.moves_value:
            if mesh.coordinate(dim.name) != mesh.coordinate_of(rank, dim.name):
                return None
            continue
        moved = _assemble_dim_on(local, dim, mesh, mesh.coordinate_of(rank, dim.name))
        if moved is None:
            return None
        local = moved
    return local


def _assemble_dim(local: Tensor, dim: DimLayout, mesh: ParallelMesh) -> Tensor:
    placement = _placement(dim)
    if is_sharded(placement):
        local = all_gather_along(
            local,
            shard_dim(placement),
            mesh.along(dim.name),
            blocks=block_count(placement),
            shard_sizes=dim.shard_sizes,
            zigzag=dim.zigzag,
        )
    elif isinstance(placement, Partial):
        local = all_reduce_sum(local, mesh.along(dim.name))
        if placement.reduce_op == "avg":
            local = local / dim.size
    return local if dim.value_scale == 1.0 else local * dim.value_scale


def _assemble_dim_on(
    local: Tensor, dim: DimLayout, mesh: ParallelMesh, index: int
) -> Tensor | None:
    placement = _placement(dim)
    if isinstance(placement, Partial):
        total = _assemble_dim(local, dim, mesh)
        return total if mesh.coordinate(dim.name) == index else None
    whole = gather_along(
        local,
        shard_dim(placement),
        mesh.along(dim.name),
        mesh.rank_at(dim.name, index),
        blocks=block_count(placement),
        shard_sizes=dim.shard_sizes,
        zigzag=dim.zigzag,
    )
    return whole if whole is None or dim.value_scale == 1.0 else whole * dim.value_scale


def _disassemble_dim(whole: Tensor, dim: DimLayout, mesh: ParallelMesh) -> Tensor:
    placement = _placement(dim)
    index = mesh.coordinate(dim.name)
    if is_sharded(placement):
        whole = slice_along(
            whole,
            shard_dim(placement),
            index,
            dim.size,
            blocks=block_count(placement),
            shard_sizes=dim.shard_sizes,
            zigzag=dim.zigzag,
        )
    elif isinstance(placement, Partial) and placement.reduce_op == "sum" and index != 0:
        whole = torch.zeros_like(whole)  # an average of equal terms needs no zeros, a sum does
    return whole if dim.value_scale == 1.0 else whole / dim.value_scale


def _placement(dim: DimLayout) -> Placement:
    if dim.value is None:
        raise RuntimeError(f"internal: the placement over {dim.name} is used before it is known")
    return dim.value


class _Gather(torch.autograd.Function):
    """Forward assembles the value, backward takes the gradient apart."""

    @staticmethod
    def forward(
        ctx: Any,
        local: Tensor,
        layout: ActivationLayout,
        mesh: ParallelMesh,
        memory: GradientMemory,
    ) -> Tensor:
        ctx.around = (layout, mesh, memory)
        return assemble(local, layout, mesh) if layout.moves_value else local.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layout, mesh, memory = ctx.around
        memory.count_gather_backward()
        layout = memory.decided(layout, gradient)
        return _Reshard.apply(gradient, layout.transposed(), mesh, memory), None, None, None


class _Reshard(torch.autograd.Function):
    """Forward takes the value apart, backward assembles the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        whole: Tensor,
        layout: ActivationLayout,
        mesh: ParallelMesh,
        memory: GradientMemory,
    ) -> Tensor:
        ctx.around = (layout, mesh, memory)
        local = disassemble(whole, layout, mesh)
        return local.view_as(local) if local is whole else local

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layout, mesh, memory = ctx.around
        layout = memory.measured(layout, gradient, mesh)
        return _Gather.apply(gradient, layout.transposed(), mesh, memory), None, None, None
