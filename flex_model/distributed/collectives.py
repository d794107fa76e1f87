"""Collectives along one mesh dim, shaped as the layouts need them.

Nothing here knows autograd or layouts: tensors and groups in, tensors out. Buffers are allocated
like the input, so the same lines run on gloo and NCCL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from flex_model.distributed.communicator import Communicator

__all__ = [
    "all_gather_along",
    "all_reduce_sum",
    "exchanged",
    "gather_along",
    "reduced",
    "slice_along",
]

# What every backend carries as it is; anything else travels as its bytes.
_WIRE_DTYPES = frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    | {torch.uint8, torch.int8, torch.int32, torch.int64}
)


def all_gather_along(
    shard: Tensor,
    dim: int,
    group: Communicator,
    *,
    blocks: int = 1,
    shard_sizes: Sequence[int] | None = None,
    zigzag: bool = False,
) -> Tensor:
    """Every rank's shard, concatenated along ``dim`` in rank order: one all-gather.

    Args:
        shard: this rank's part, ``[..., blocks * own, ...]``.
        dim: the sharded tensor dim.
        group: ranks that hold the parts.
        blocks: outer blocks of ``dim``; ranks are concatenated within each block.
        shard_sizes: length of each rank's part within one block where they differ (the shorter
            ones travel padded, for gloo ends the process on uneven all-gathers).
        zigzag: rank r of C holds chunks r and 2C-1-r of each block's 2C; they come back in order.

    Returns:
        ``[..., blocks * sum(own), ...]``, freshly allocated.
    """
    size = group.size

    def exchange(part: Tensor) -> Sequence[Tensor]:
        gathered = part.new_empty((size * part.shape[0], *part.shape[1:]))
        work = dist.all_gather_single(gathered, part, group=group.group, async_op=True)
        group.finish(work, part.device)
        if dim == 0 and blocks == 1 and shard_sizes is None and not zigzag:
            return (gathered,)  # rank order along dim 0 is already the whole tensor
        return gathered.view(size, *part.shape).unbind(0)

    return _assemble(shard, dim, exchange, blocks, shard_sizes, zigzag)


def gather_along(
    shard: Tensor,
    dim: int,
    group: Communicator,
    destination: int,
    *,
    blocks: int = 1,
    shard_sizes: Sequence[int] | None = None,
    zigzag: bool = False,
) -> Tensor | None:
    """As `all_gather_along`, but only global rank ``destination`` gets the whole tensor."""
    here = dist.get_rank() == destination

    def exchange(part: Tensor) -> Sequence[Tensor]:
        parts = [torch.empty_like(part) for _ in range(group.size)] if here else None
        work = dist.gather(part, parts, dst=destination, group=group.group, async_op=True)
        group.finish(work, part.device)
        return parts or ()

    if here:
        return _assemble(shard, dim, exchange, blocks, shard_sizes, zigzag)
    exchange(_wire(_padded(shard, dim, blocks, shard_sizes)))
    return None


def all_reduce_sum(term: Tensor, group: Communicator, *, in_place: bool = False) -> Tensor:
    """The sum over the group on every rank: freshly allocated, or in a contiguous ``term``."""
    return reduced(term, group, dist.ReduceOp.SUM, in_place=in_place)


def reduced(
    term: Tensor,
    group: Communicator,
    operation: dist.ReduceOp.RedOpType,
    *,
    in_place: bool = False,
) -> Tensor:
    """One all-reduce into a fresh tensor, or into a contiguous ``term`` itself."""
    total = term.detach()
    if not in_place:
        total = total.clone(memory_format=torch.contiguous_format)
    work = dist.all_reduce(total, op=operation, group=group.group, async_op=True)
    group.finish(work, total.device)
    return total


def exchanged(
    own: Sequence[int], device: torch.device, group: Communicator
) -> list[tuple[int, ...]]:
    """Every rank's few integers, in rank order: one small all-gather."""
    row = torch.tensor(own, dtype=torch.int64, device=device)
    rows = row.new_empty(group.size * len(own))
    group.finish(dist.all_gather_single(rows, row, group=group.group, async_op=True), device)
    return [tuple(row) for row in rows.view(-1, len(own)).tolist()]


def slice_along(
    whole: Tensor,
    dim: int,
    index: int,
    size: int,
    *,
    blocks: int = 1,
    shard_sizes: Sequence[int] | None = None,
    zigzag: bool = False,
) -> Tensor:
    """The part of ``whole`` that rank ``index`` of ``size`` holds: inverse of the gathers.

    Contiguous, for frameworks ``view`` what their layers return.
    """
    if blocks > 1:
        blocked = whole.unflatten(dim, (blocks, -1))
        own = slice_along(blocked, dim + 1, index, size, shard_sizes=shard_sizes, zigzag=zigzag)
        return own.flatten(dim, dim + 1)
    if zigzag:
        length = whole.shape[dim] // (2 * size)
        chunks = (whole.narrow(dim, at * length, length) for at in (index, 2 * size - 1 - index))
        return torch.cat(list(chunks), dim)
    if shard_sizes is None:
        length = whole.shape[dim] // size
        start = index * length
    else:
        length = shard_sizes[index]
        start = sum(shard_sizes[:index])
    return whole.narrow(dim, start, length).contiguous()


def _assemble(
    shard: Tensor,
    dim: int,
    exchange: Callable[[Tensor], Sequence[Tensor]],
    blocks: int,
    shard_sizes: Sequence[int] | None,
    zigzag: bool,
) -> Tensor:
    """Pad, exchange, cut the padding off, concatenate within the outer blocks."""
    padded = _padded(shard, dim, blocks, shard_sizes)
    parts = [_unwire(part, padded) for part in exchange(_wire(padded))]
    if len(parts) == 1 and shard_sizes is None and blocks == 1:
        return parts[0]
    at = dim
    if blocks > 1:
        at = dim + 1
        if shard_sizes is None:
            parts = [part.unflatten(dim, (blocks, -1)) for part in parts]
    if shard_sizes is not None:
        parts = [part.narrow(at, 0, own) for part, own in zip(parts, shard_sizes, strict=True)]
    whole = torch.cat(_there_and_back(parts, at) if zigzag else parts, dim=at)
    return whole.flatten(dim, at) if blocks > 1 else whole


def _there_and_back(parts: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Zig-zag parts in the whole's order: the ranks' first halves, back through the second."""
    halves = [part.chunk(2, dim) for part in parts]
    return [first for first, _ in halves] + [second for _, second in reversed(halves)]


def _padded(shard: Tensor, dim: int, blocks: int, shard_sizes: Sequence[int] | None) -> Tensor:
    """The shard as it travels: as it is, or (uneven) opened into its blocks and padded."""
    if shard_sizes is None:
        return shard.contiguous()
    at = dim
    if blocks > 1:
        shard = shard.unflatten(dim, (blocks, -1))
        at = dim + 1
    longest = max(shard_sizes)
    if shard.shape[at] == longest:
        return shard.contiguous()
    padded = shard.new_zeros((*shard.shape[:at], longest, *shard.shape[at + 1 :]))
    padded.narrow(at, 0, shard.shape[at]).copy_(shard)
    return padded


def _wire(tensor: Tensor) -> Tensor:
    tensor = tensor.resolve_conj().resolve_neg()  # else its memory holds other values
    return tensor if tensor.dtype in _WIRE_DTYPES else tensor.unsqueeze(-1).view(torch.uint8)


def _unwire(tensor: Tensor, like: Tensor) -> Tensor:
    if like.dtype in _WIRE_DTYPES:
        return tensor
    return tensor.view(like.dtype).squeeze(-1)
