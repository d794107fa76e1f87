"""How a tensor dim is cut over the ranks, and rotating along it with as little traffic as it needs.

A rotation of blocks that no rank shares is a local one. Hadamard's over all of a dim that 2^j ranks
hold in equal stretches is a local one and j exchanges with one rank each, for the matrix is the
ranks' times one on each (Kronecker). Anything else is done on the whole dim, gathered once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from flex_model.compress.spinquant.hadamard import core_size
from flex_model.compress.spinquant.orthogonal import Hadamard, Rotation
from flex_model.distributed.collectives import all_gather_along, slice_along
from flex_model.distributed.communicator import Communicator
from flex_model.errors import CompressionError
from flex_model.layouts.layout import block_count, is_sharded, shard_dim
from flex_model.layouts.resolve import groups_of, parameter_placement

__all__ = ["Cut", "Split", "cuts_of", "local_of", "turn"]


@dataclass(frozen=True)
class Split:
    """A dim shared out over the ranks of one group.

    Attributes:
        group: the ranks.
        blocks: outer blocks, each of which is shared out by itself.
        sizes: each rank's length of a block where they differ.
    """

    group: Communicator
    blocks: int = 1
    sizes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Cut:
    """One dim of a tensor, of which this rank holds a part.

    Attributes:
        splits: in the order in which the whole was shared out.
        length: of the whole.
        held: positions in the whole of what is here, ascending: ``[n]``.
    """

    splits: tuple[Split, ...]
    length: int
    held: Tensor

    @classmethod
    def of(cls, splits: Sequence[Split], length: int) -> Cut:
        held = torch.arange(length)
        for split in splits:
            rank, ranks = split.group.group.rank(), split.group.size
            held = slice_along(held, 0, rank, ranks, blocks=split.blocks, shard_sizes=split.sizes)
        return cls(tuple(splits), length, held)

    def gathered(self, x: Tensor, dim: int) -> Tensor:
        """The whole dim. Collective."""
        for split in reversed(self.splits):
            x = all_gather_along(x, dim, split.group, blocks=split.blocks, shard_sizes=split.sizes)
        return x

    def part(self, whole: Tensor, dim: int) -> Tensor:
        """What of the whole dim is held here."""
        return whole.index_select(dim, self.held.to(whole.device))

    @property
    def pairable(self) -> Communicator | None:
        """The ranks, if there are 2^j that hold one equal stretch each in order."""
        if len(self.splits) != 1:
            return None
        split = self.splits[0]
        ranks = split.group.size
        even = split.blocks == 1 and split.sizes is None and self.length % ranks == 0
        return split.group if even and ranks & (ranks - 1) == 0 else None


def local_of(tensor: Tensor) -> Tensor:
    """What of a parameter is on this rank, in its own memory."""
    held = tensor.detach()
    return held.to_local() if isinstance(held, DTensor) else held


def cuts_of(root: nn.Module, name: str, parameter: Tensor) -> tuple[Cut | None, ...]:
    """How each dim of a parameter is cut; None where it is whole.

    Args:
        root: the model.
        name: the parameter's plain name.
        parameter: this rank's.

    Raises:
        CompressionError: what is here is not what its framework tells.
    """
    found: list[Cut | None] = []
    placements = _placements(root, name, parameter)
    for dim, length in enumerate(parameter.shape):
        own = [(p, group) for p, group in placements if shard_dim(p) == dim]
        if not isinstance(parameter, DTensor):
            length *= math.prod(group.size() for _, group in own)
        splits, left = [], length
        for placement, group in own:
            blocks = block_count(placement)
            sizes = _sizes(left // blocks, group.size())
            splits.append(Split(Communicator(group), blocks, sizes))
            left = blocks * (sizes[group.rank()] if sizes else left // blocks // group.size())
        if left != local_of(parameter).shape[dim]:
            raise CompressionError(
                f"{name}: this rank holds {local_of(parameter).shape[dim]} of {length} entries of "
                f"dim {dim}, not the {left} that its placement tells."
            )
        found.append(Cut.of(splits, length) if splits else None)
    return tuple(found)


def _sizes(length: int, ranks: int) -> tuple[int, ...] | None:
    """What each rank gets of a length that does not divide, as ``torch.chunk`` cuts it."""
    if length % ranks == 0:
        return None
    longest = -(-length // ranks)
    return tuple(max(0, min(longest, length - rank * longest)) for rank in range(ranks))


def _placements(
    root: nn.Module, name: str, parameter: Tensor
) -> list[tuple[Placement, dist.ProcessGroup]]:
    """Those that cut it, with the ranks, in the order of mesh dims."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        return [
            (placement, mesh.get_group(axis))
            for axis, placement in enumerate(parameter.placements)
            if is_sharded(placement) and mesh.size(axis) > 1
        ]
    group, placement = groups_of(root).get("tp"), parameter_placement(root, name, parameter)
    if group is None or placement is None or not is_sharded(placement):
        return []
    return [(placement, group)]


def is_local(rotation: Rotation, cut: Cut | None, positions: Tensor | None = None) -> bool:
    """Whether `turn` needs no whole dim: blocks that no rank shares, or exchanges of pairs."""
    if cut is None or _by_exchange(rotation, cut, positions):
        return True
    held = torch.isin(_blocks(rotation, cut.length, positions), cut.held)
    return bool((held.all(1) | ~held.any(1)).all())


def turn(
    x: Tensor, dim: int, rotation: Rotation, cut: Cut | None = None, positions: Tensor | None = None
) -> Tensor:
    """``x R`` along one dim, block by block.

    Args:
        x: this rank's part, ``[..., held, ...]``.
        dim: the dim that is rotated.
        rotation: R, of a block's size. Ranks that share blocks have the same.
        cut: how that dim is cut; None where it is whole. Collective where `is_local` is False and
            for Hadamard's over several ranks.
        positions: the blocks, ``[blocks, R's size]`` positions in the whole dim; None for
            consecutive ones that fill it. What is in none stays.
    """
    if cut is None:
        return _turn_here(x, dim, rotation, positions)
    if _by_exchange(rotation, cut, positions) or not is_local(rotation, cut, positions):
        return _Across.apply(x, dim, rotation, cut, positions)
    return _turn_held(x, dim, rotation, cut, positions)


def _by_exchange(rotation: Rotation, cut: Cut, positions: Tensor | None) -> bool:
    """One Hadamard block over 2^j ranks, each of which holds a multiple of its indivisible core."""
    group = cut.pairable
    if group is None or positions is not None or not isinstance(rotation, Hadamard):
        return False
    own = cut.length // group.size
    return rotation.size == cut.length and own % core_size(rotation.size) == 0


def _turn_here(x: Tensor, dim: int, rotation: Rotation, positions: Tensor | None) -> Tensor:
    rows = x.movedim(dim, -1)
    if positions is None:
        turned = rotation.apply(rows.unflatten(-1, (-1, rotation.size))).flatten(-2)
        return turned.movedim(-1, dim)
    index = positions.flatten().to(x.device)
    chosen = rows.index_select(-1, index).unflatten(-1, tuple(positions.shape))
    turned = rotation.apply(chosen).flatten(-2)
    return rows.index_copy(-1, index, turned).movedim(-1, dim)


def _turn_held(
    x: Tensor, dim: int, rotation: Rotation, cut: Cut, positions: Tensor | None
) -> Tensor:
    blocks = _blocks(rotation, cut.length, positions)
    own = torch.searchsorted(cut.held, blocks[torch.isin(blocks[:, 0], cut.held)])
    in_order = positions is None and torch.equal(own.flatten(), torch.arange(len(cut.held)))
    return _turn_here(x, dim, rotation, None if in_order else own)


def _blocks(rotation: Rotation, length: int, positions: Tensor | None) -> Tensor:
    return torch.arange(length).view(-1, rotation.size) if positions is None else positions


class _Across(torch.autograd.Function):
    """A rotation that ranks share. It is orthogonal, so its backward is its inverse's forward."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        dim: int,
        rotation: Rotation,
        cut: Cut,
        positions: Tensor | None,
    ) -> Tensor:
        ctx.how = (dim, rotation, cut, positions)  # type: ignore[attr-defined]
        if isinstance(rotation, Hadamard) and _by_exchange(rotation, cut, positions):
            return _exchanged(x, dim, rotation, cut)
        whole = _turn_here(cut.gathered(x, dim % x.ndim), dim, rotation, positions)
        return cut.part(whole, dim)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dim, rotation, cut, positions = ctx.how  # type: ignore[attr-defined]
        return turn(gradient, dim, rotation.inverse, cut, positions), None, None, None, None


def _exchanged(x: Tensor, dim: int, rotation: Hadamard, cut: Cut) -> Tensor:
    """``H = H_ranks (x) H_here``: a local transform, and a butterfly with one rank per bit."""
    group = cut.splits[0].group
    signs = None if rotation.signs is None else cut.part(rotation.signs, 0)
    here = Hadamard(len(cut.held), None, rotation.backwards)
    y = x.movedim(dim, -1)
    if signs is not None and not rotation.backwards:
        y = y * signs.to(y)
    y = here.apply(y).contiguous()
    rank, bit = group.group.rank(), 1
    while bit < group.size:
        other = _swapped(y, group, rank ^ bit)
        y = (other - y if rank & bit else y + other) / math.sqrt(2)
        bit *= 2
    if signs is not None and rotation.backwards:
        y = y * signs.to(y)
    return y.movedim(-1, dim)


def _swapped(x: Tensor, group: Communicator, partner: int) -> Tensor:
    """The partner's tensor for ours."""
    other, peer = torch.empty_like(x), group.ranks[partner]
    exchange = [
        dist.P2POp(dist.isend, x, peer, group.group),
        dist.P2POp(dist.irecv, other, peer, group.group),
    ]
    for work in dist.batch_isend_irecv(exchange):
        group.finish(work, x.device)
    return other
