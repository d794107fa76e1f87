"""A part of an activation's features (the queries, a head), seen as an activation of its own.

Where every rank holds its own share of the part, in rank order, nothing of the other features is
moved: the part is taken on each rank and has a layout of its own. Else the features are gathered
first and the part is taken of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import Shard

from flex_model.distributed.collectives import slice_along
from flex_model.distributed.gradients import GradientMemory
from flex_model.distributed.mesh import ParallelMesh
from flex_model.distributed.routing import gather, reshard
from flex_model.layouts.layout import (
    ActivationLayout,
    DimLayout,
    block_count,
    is_sharded,
    shard_dim,
)

__all__ = ["Selected", "select"]


@dataclass(frozen=True)
class Selected:
    """The part on this rank.

    Attributes:
        local: this rank's share of it.
        layout: how the part lies over the mesh.
        put_back: takes what an edit made of ``local``; gives the whole of this rank's activation.
    """

    local: Tensor
    layout: ActivationLayout
    put_back: Callable[[Tensor], Tensor]


def select(
    local: Tensor,
    layout: ActivationLayout,
    positions: Tensor,
    mesh: ParallelMesh,
    memory: GradientMemory,
) -> Selected:
    """Take a part of an activation.

    Args:
        local: this rank's tensor.
        layout: how it lies.
        positions: of the part along the whole last dim, in order.
        mesh: the job's ranks.
        memory: where measured gradient placements are kept.
    """
    last = local.ndim - 1
    cutting = [d for d in layout.dims if is_sharded(d.value) and _at(d, local.ndim) == last]
    own = _shares(cutting, positions, local.shape[-1], mesh) if len(cutting) == 1 else None
    if own is not None:
        mine, part = own
        dims = tuple(part if dim.name == part.name else dim for dim in layout.dims)
        return _taken(local, ActivationLayout(dims), mine)
    among = ActivationLayout(tuple(cutting))
    whole = gather(local, among, mesh, memory) if cutting else local
    rest = ActivationLayout(tuple(dim for dim in layout.dims if dim not in cutting))
    taken = _taken(whole, rest, positions)
    if not cutting:
        return taken
    return replace(
        taken, put_back=lambda edited: reshard(taken.put_back(edited), among, mesh, memory)
    )


def _taken(tensor: Tensor, layout: ActivationLayout, positions: Tensor) -> Selected:
    at = positions.to(tensor.device)
    part = tensor.index_select(-1, at)
    return Selected(part, layout, lambda edited: tensor.index_copy(-1, at, edited))


def _shares(
    cutting: list[DimLayout], positions: Tensor, local_length: int, mesh: ParallelMesh
) -> tuple[Tensor, DimLayout] | None:
    """This rank's share of the part and its layout; None if ranks do not hold it in order."""
    dim = cutting[0]
    if getattr(dim, "zigzag", False):
        return None
    everything = torch.arange(dim.whole_length(local_length))
    held = [_held(everything, dim, rank) for rank in range(dim.size)]
    shares = [torch.isin(own, positions).nonzero().flatten() for own in held]
    in_order = torch.cat([own[share] for own, share in zip(held, shares, strict=True)])
    if not torch.equal(in_order, positions):
        return None
    lengths = tuple(len(share) for share in shares)
    cut = Shard(dim.value.dim)  # type: ignore[union-attr]
    part = replace(
        dim,
        value=cut,
        gradient=cut if is_sharded(dim.gradient) else dim.gradient,
        shard_sizes=None if len(set(lengths)) == 1 else lengths,
    )
    return shares[mesh.coordinate(dim.name)], part


def _held(everything: Tensor, dim: DimLayout, rank: int) -> Tensor:
    blocks = block_count(dim.value)  # type: ignore[arg-type]
    return slice_along(everything, 0, rank, dim.size, blocks=blocks, shard_sizes=dim.shard_sizes)


def _at(dim: DimLayout, ndim: int) -> int:
    return shard_dim(dim.value) % ndim  # type: ignore[arg-type]
