"""Results of a function on every rank's part, combined to its result on the whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from flex_model.distributed.collectives import reduced
from flex_model.distributed.mesh import ParallelMesh
from flex_model.distributed.routing import assemble
from flex_model.errors import EditError
from flex_model.layouts.layout import ActivationLayout, DimLayout, shard_dim

__all__ = ["combined"]

_OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}


def combined(
    found: Tensor,
    part: Sequence[int],
    local: ActivationLayout,
    reduced_dims: set[int],
    how: str,
    mesh: ParallelMesh,
    where: str,
) -> Tensor:
    """A statistic of the whole tensor, on every rank.

    Args:
        found: its result on this rank's part.
        part: sizes of that part.
        local: the mesh dims that the part is cut over.
        reduced_dims: tensor dims that the statistic has reduced.
        how: "sum", "mean", "max" or "min".
        mesh: the job's ranks.
        where: module, kind and rank, for messages.

    Raises:
        EditError: the result has neither the dims that are left, nor all with ``keepdim``.
    """
    ndim = len(part)
    kept = found.ndim == ndim
    if not kept and found.ndim != ndim - len(reduced_dims):
        raise EditError(
            f"{where}: a statistic of a tensor {tuple(part)} over dims {sorted(reduced_dims)} "
            f"returned shape {tuple(found.shape)}; due are {ndim - len(reduced_dims)} dims, or "
            f"{ndim} with keepdim."
        )
    for dim in reversed(local.dims):
        at = shard_dim(dim.value) % ndim  # type: ignore[arg-type]
        if at in reduced_dims:
            found = _over(found, dim, part[at], how, mesh)
        else:
            place = at if kept else at - sum(r < at for r in reduced_dims)
            found = assemble(found, ActivationLayout((dim.on(place),)), mesh)
    return found


def _over(found: Tensor, dim: DimLayout, length: int, how: str, mesh: ParallelMesh) -> Tensor:
    """Combine over one mesh dim that cuts a reduced tensor dim."""
    if how == "mean":
        found = found * (length / dim.whole_length(length))
    return reduced(found, mesh.along(dim.name), _OPERATIONS[how])
