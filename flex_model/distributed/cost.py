"""What it costs to make an activation whole: pure arithmetic on a layout and a local shape.

With n ranks in a group, g such groups, and a part of p bytes on each rank (padded to the longest
where shards are uneven), all ranks together receive

==========  ======================  ================================================
all-gather  ``g * n * (n - 1) * p``  every rank gets every other's part
gather      ``g * (n - 1) * p``      one rank of each group does
all-reduce  ``g * 2 * (n - 1) * p``  a ring: parts of 1/n go round once to be summed,
                                     and once more as sums
==========  ======================  ================================================

Mesh dims are assembled from the last to the first, each on what the one before made, as `routing`
does it. A record is made on one rank: behind each dim only the ranks at its coordinate go on. An
edit assembles the value on every rank, and in backward the gradient by its own placements;
re-sharding moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch.distributed.tensor import Partial, Replicate
from torch.distributed.tensor.placement_types import Placement

from flex_model.layouts.layout import (
    ActivationLayout,
    DimLayout,
    block_count,
    is_sharded,
    shard_dim,
)

__all__ = ["Collective", "peak_bytes", "to_every_rank", "to_one_rank", "with_gradients"]


@dataclass(frozen=True)
class Collective:
    """One kind of collective along one mesh dim.

    Attributes:
        kind: "all-gather", "gather" or "all-reduce".
        dim: the mesh dim.
        ranks: members of a group.
        groups: groups that run it.
        part: bytes that each rank brings.
    """

    kind: str
    dim: str
    ranks: int
    groups: int
    part: int

    @property
    def received(self) -> int:
        """Bytes received, over all ranks."""
        copies = {"all-gather": self.ranks, "gather": 1, "all-reduce": 2}[self.kind]
        return self.groups * copies * (self.ranks - 1) * self.part


@dataclass(frozen=True)
class _Step:
    """Assembling one mesh dim: sizes before, as it travels, and after."""

    dim: DimLayout
    before: tuple[int, ...]
    travels: tuple[int, ...]
    after: tuple[int, ...]


def to_every_rank(
    layout: ActivationLayout, local_shape: Sequence[int], itemsize: int
) -> list[Collective]:
    """The collectives that make a value whole on every rank.

    Args:
        layout: how it lies; that of its gradient is ``layout.transposed()``.
        local_shape: its sizes on a rank.
        itemsize: bytes of an element.
    """
    ranks = prod(dim.size for dim in layout.dims)
    return [
        Collective(
            "all-gather" if is_sharded(step.dim.value) else "all-reduce",
            step.dim.name,
            step.dim.size,
            ranks // step.dim.size,
            prod(step.travels) * itemsize,
        )
        for step in _steps(layout, local_shape)
        if step.dim.moves_value
    ]


def to_one_rank(
    layout: ActivationLayout, local_shape: Sequence[int], itemsize: int
) -> list[Collective]:
    """The collectives that make a value whole on one rank, for a record. See `to_every_rank`."""
    found = []
    for number, step in enumerate(_steps(layout, local_shape), start=1):
        if step.dim.moves_value:
            # The dims behind this one have left one coordinate each; those before it all theirs.
            groups = prod(dim.size for dim in layout.dims[: len(layout.dims) - number])
            kind = "gather" if is_sharded(step.dim.value) else "all-reduce"
            part = prod(step.travels) * itemsize
            found.append(Collective(kind, step.dim.name, step.dim.size, groups, part))
    return found


def peak_bytes(
    layout: ActivationLayout, local_shape: Sequence[int], itemsize: int, *, one: bool = False
) -> int:
    """The most that assembling holds at once on a rank, beside the local tensor.

    While one mesh dim is assembled there are: what the dim before it made, the parts as they came
    and what they make; these two are one where parts lie behind each other already.

    Args:
        layout: how the value lies.
        local_shape: its sizes on a rank.
        itemsize: bytes of an element.
        one: whether it is made on one rank alone, and on that rank.
    """
    peak, before = 0, 0
    for step in _steps(layout, local_shape):
        if step.dim.moves_value:
            after = prod(step.after)
            scaled = step.dim.value_scale != 1.0 or _operation(step.dim.value) == "avg"
            made = max(_made(step, one=one), 2 * after if scaled else 0)
            peak, before = max(peak, before + made), after
    return peak * itemsize


def with_gradients(layout: ActivationLayout, placement: Placement) -> ActivationLayout:
    """The layout with one placement for every gradient that nothing tells."""
    return ActivationLayout(
        tuple(
            replace(dim, gradient=placement) if dim.gradient is None else dim for dim in layout.dims
        )
    )


def _made(step: _Step, *, one: bool) -> int:
    """Elements of the tensors that assembling one mesh dim makes, while they are all there."""
    dim = step.dim
    if not is_sharded(dim.value):
        return prod(step.after)
    padded = prod(step.travels) if step.travels != step.before else 0
    parts = dim.size * prod(step.travels)
    in_place = shard_dim(dim.value) == 0 and block_count(dim.value) == 1  # type: ignore[arg-type]
    if in_place and dim.shard_sizes is None and not dim.zigzag and not one:
        return parts
    return padded + parts + prod(step.after)


def _steps(layout: ActivationLayout, local_shape: Sequence[int]) -> Iterator[_Step]:
    """The mesh dims in the order in which they are assembled."""
    shape = tuple(local_shape)
    for dim in reversed(layout.dims):
        travels = after = shape
        if is_sharded(dim.value):
            at = shard_dim(dim.value)  # type: ignore[arg-type]
            after = (*shape[:at], dim.whole_length(shape[at]), *shape[at + 1 :])
            if dim.shard_sizes is not None:
                longest = block_count(dim.value) * max(dim.shard_sizes)  # type: ignore[arg-type]
                travels = (*shape[:at], longest, *shape[at + 1 :])
        elif not isinstance(dim.value, (Partial, Replicate)):
            raise ValueError(f"the placement over {dim.name} is not known: {dim.value}")
        yield _Step(dim, shape, travels, after)
        shape = after


def _operation(placement: Placement | None) -> str:
    return placement.reduce_op if isinstance(placement, Partial) else ""
