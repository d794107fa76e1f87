"""The same on shards: every rank ends with the shard of the pruned whole, by moving what it must.

Ranks hold equal stretches of a dim before and after, but what is kept is spread unevenly over them.
So entries whose place in the pruned whole lies with another rank go there, in one all-to-all for
each weight; all others stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from flex_model.distributed.collectives import slice_along
from flex_model.errors import PruningError
from flex_model.layouts.dtensor import shard_sizes
from flex_model.layouts.layout import block_count, is_sharded, shard_dim
from flex_model.layouts.resolve import groups_of
from flex_model.pruning.dimensions import Dimensions
from flex_model.pruning.rows import as_row_numbers, as_rows, selected

__all__ = ["check_even", "check_spread", "ranks_of", "selected_shard"]


def ranks_of(model: nn.Module) -> ProcessGroup | None:
    """The ranks that a model's weights are spread over; None where each rank has them all."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    groups = groups_of(model)
    return groups.get("tp") or next(iter(groups.values()), None)


def check_spread(model: nn.Module) -> None:
    """That a model is whole, or spread over tensor-parallel ranks and over no others.

    Raises:
        PruningError: it is spread otherwise.
    """
    others = set(groups_of(model)) - {"tp"} if dist.is_available() and dist.is_initialized() else ()
    if others:
        raise PruningError(
            f"The model is spread over ranks along {', '.join(sorted(others))}; only tensor "
            "parallelism can be pruned in place. Prune it first, and spread what is saved."
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            placement = parameter.placements[0]
            fits = is_sharded(placement) or isinstance(placement, Replicate)
            if parameter.device_mesh.ndim > 1 or not fits:
                raise PruningError(f"{name} lies as {parameter.placements}, which cannot be cut.")


def check_even(model: nn.Module, dimensions: Dimensions, sizes: Mapping[str, int]) -> None:
    """That each rank can hold as much of every pruned dim as the others.

    Raises:
        PruningError: a size that does not divide over the ranks, or experts that lie on several.
    """
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor) or not is_sharded(parameter.placements[0]):
            continue
        ranks = parameter.device_mesh.size()
        for part in dimensions.weights[name].axes[shard_dim(parameter.placements[0])]:
            left = sizes.get(part.space.field) if part.space is not None else None
            if part.space is None or left is None or left == part.space.size:
                continue
            if part.space.dimension == "experts":
                raise PruningError(f"{name} is cut by experts: spread it by tp_plan to prune it.")
            if left % ranks:
                raise PruningError(
                    f"{part.space.field}={left} does not divide over {ranks} tensor-parallel "
                    f"ranks, which hold {name} in even shards. Choose a multiple of {ranks}: a "
                    "size, or multiple_of beside a ratio or a budget."
                )


def selected_shard(tensor: DTensor, dim: int, index: Tensor) -> DTensor:
    """This rank's shard of the entries at ``index``, taken of the whole. Collective.

    Args:
        tensor: sharded over one mesh dim, or replicated.
        dim: where the entries lie.
        index: positions in the whole, ``[left]`` or ``[experts, left]``.
    """
    local, placement = tensor.to_local(), tensor.placements[0]
    if not is_sharded(placement) or shard_dim(placement) != dim:
        local = selected(local, dim, index)
    else:
        local = _moved(tensor, local, dim, index)
    shape = torch.Size((*tensor.shape[:dim], index.shape[-1], *tensor.shape[dim + 1 :]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride
    )


def _moved(tensor: DTensor, local: Tensor, dim: int, index: Tensor) -> Tensor:
    placement, group = tensor.placements[0], tensor.device_mesh.get_group()
    length, left, ranks = tensor.shape[dim], index.shape[-1], group.size()
    uneven = shard_sizes(tensor, placement, ranks)
    held = [_stretch(length, placement, rank, ranks, uneven) for rank in range(ranks)]
    wanted = [index[..., _stretch(left, placement, rank, ranks, None)] for rank in range(ranks)]
    rows, back = as_rows(local, dim, index.ndim == 2)
    if index.ndim == 2:
        held = [own.expand(len(index), -1) for own in held]
    exchanged = _exchange(
        rows,
        [as_row_numbers(own, length) for own in held],
        [as_row_numbers(own, length) for own in wanted],
        group,
    )
    return back(exchanged, wanted[group.rank()].shape[-1])


def _stretch(
    length: int, placement: Placement, rank: int, ranks: int, uneven: Sequence[int] | None
) -> Tensor:
    """The positions that a rank holds of a dim."""
    whole, blocks = torch.arange(length), block_count(placement)
    return slice_along(whole, 0, rank, ranks, blocks=blocks, shard_sizes=uneven)


def _exchange(
    rows: Tensor, held: Sequence[Tensor], wanted: Sequence[Tensor], group: ProcessGroup
) -> Tensor:
    """The rows that this rank wants, in order, from those who hold them.

    Args:
        rows: this rank's, ``[n, ...]``.
        held: the numbers of each rank's rows, ascending.
        wanted: the numbers of the rows that each rank shall have; each is held by one rank.
        group: the ranks.
    """
    own = group.rank()
    sent = [numbers[torch.isin(numbers, held[own])] for numbers in wanted]
    come = [torch.isin(wanted[own], numbers).nonzero().flatten() for numbers in held]
    outgoing = rows.index_select(0, torch.searchsorted(held[own], torch.cat(sent)).to(rows.device))
    incoming = rows.new_empty((len(wanted[own]), *rows.shape[1:]))
    dist.all_to_all_single(
        incoming,
        outgoing.contiguous(),
        [len(places) for places in come],
        [len(numbers) for numbers in sent],
        group=group,
    )
    return torch.empty_like(incoming).index_copy_(0, torch.cat(come).to(rows.device), incoming)
