"""Where a mesh dim cuts a local tensor: the small algebra that propagation computes with.

A mark says, for one tensor and one mesh dim, what the ranks along it hold:

* ``WHOLE``: the same tensor on every rank;
* ``Cut(dim, outer)``: slices of tensor dim ``dim``. The dim's local entries, in row-major order,
  are ``outer`` unsharded blocks each of which is sharded from its front; ``outer == 1`` is torch's
  ``Shard(dim)``, anything else its ``_StridedShard(dim, split_factor=outer)``;
* ``OneOf(cuts)``: a cut that local shapes alone leave open;
* ``TERM``: terms of a sum;
* ``FOREIGN``: not computed in the watched forward (a cache, a constant kept in a Python attribute),
  so nothing is known of it, and it is taken to fit what it is combined with;
* ``UNKNOWN``: computed by something that no rule follows.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from flex_model.layouts.layout import block_count, is_sharded, shard_dim

__all__ = [
    "FOREIGN",
    "TERM",
    "UNKNOWN",
    "WHOLE",
    "Cut",
    "Mark",
    "OneOf",
    "from_placement",
    "one_of",
    "reviewed",
    "to_placement",
]


class _State(enum.Enum):
    WHOLE = "whole"
    TERM = "term of a sum"
    FOREIGN = "from elsewhere"
    UNKNOWN = "unknown"

    def __repr__(self) -> str:
        return self.name


WHOLE, TERM, FOREIGN, UNKNOWN = _State.WHOLE, _State.TERM, _State.FOREIGN, _State.UNKNOWN


@dataclass(frozen=True)
class Cut:
    """Tensor dim ``dim`` is sharded within each of its ``outer`` leading blocks."""

    dim: int
    outer: int = 1


@dataclass(frozen=True)
class OneOf:
    """Cut in one of these ways: which one, a later operation may decide."""

    cuts: frozenset[Cut]


Mark = Cut | OneOf | _State


def from_placement(placement: Placement, ndim: int) -> Mark:
    """The mark that a torch placement means on a tensor of ``ndim`` dims."""
    if is_sharded(placement):
        return Cut(shard_dim(placement) % ndim, block_count(placement))
    return TERM if isinstance(placement, Partial) else WHOLE


def to_placement(mark: Mark) -> Placement | None:
    """The torch placement that a mark means; None for what is not known."""
    if isinstance(mark, Cut):
        return (
            Shard(mark.dim) if mark.outer == 1 else _StridedShard(mark.dim, split_factor=mark.outer)
        )
    if mark is WHOLE:
        return Replicate()
    return Partial() if mark is TERM else None


def one_of(marks: Iterable[Mark]) -> Mark:
    """What is known when one of several marks is right: the cuts among them."""
    cuts: set[Cut] = set()
    for mark in marks:
        if isinstance(mark, OneOf):
            cuts |= mark.cuts
        elif isinstance(mark, Cut):
            cuts.add(mark)
    if len(cuts) == 1:
        return cuts.pop()
    return OneOf(frozenset(cuts)) if cuts else UNKNOWN


def reviewed(mark: Mark, before: Sequence[int], after: Sequence[int]) -> Mark:
    """The mark of `tensor.view(after)`, from local shapes alone.

    A cut lies behind a number of leading entries that a view does not change; it may begin at any
    dim of the result that as many entries lead up to. Dims of length 1 (one head, one sample on
    this rank) can leave more than one.

    >>> reviewed(Cut(2), (4, 5, 12), (4, 5, 3, 4))      # split heads: sharded heads
    Cut(dim=2, outer=1)
    >>> reviewed(Cut(1), (5, 4, 8), (20, 8))            # [sequence, batch] flattened
    Cut(dim=0, outer=5)
    """
    if not isinstance(mark, Cut) or tuple(before) == tuple(after):
        return mark
    if 0 in before or 0 in after:
        return UNKNOWN
    leading = math.prod(before[: mark.dim]) * mark.outer
    own_length = before[mark.dim] // mark.outer
    ones_before, ones_after = _ones_behind(leading, before), _ones_behind(leading, after)
    if mark.dim in ones_before and len(ones_before) == len(ones_after):
        return Cut(ones_after[ones_before.index(mark.dim)])
    possible = _cuts_behind(leading, after)
    if own_length > 1:
        # A longer shard becomes a lone entry only of a dim that the view puts in.
        inserted = len(ones_after) > len(ones_before)
        long = [cut for cut in possible if after[cut.dim] > cut.outer]
        possible = [
            c for c in possible if c in long or (inserted and c.dim in ones_after)
        ] or possible
    return one_of(possible)


def _cuts_behind(leading: int, shape: Sequence[int]) -> list[Cut]:
    """Every cut that `leading` entries lie in front of."""
    cuts = []
    for dim, size in enumerate(shape):
        outer, rest = divmod(leading, math.prod(shape[:dim]))
        if rest == 0 and outer > 0 and size % outer == 0:
            cuts.append(Cut(dim, outer))
    return cuts


def _ones_behind(leading: int, shape: Sequence[int]) -> list[int]:
    """Dims of length 1 that `leading` entries lie in front of."""
    return [d for d, size in enumerate(shape) if size == 1 and math.prod(shape[:d]) == leading]
