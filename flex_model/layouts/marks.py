"""Where a mesh dim cuts a local tensor: the small algebra that propagation computes with.

A mark says, for one tensor and one mesh dim, what the ranks along it hold:

* ``WHOLE``: the same tensor on every rank;
* ``Cut(dim, outer)``: slices of tensor dim ``dim``. The dim's local entries, in row-major order,
  are ``outer`` unsharded blocks each of which is sharded from its front; ``outer == 1`` is torch's
  ``Shard(dim)``, anything else its ``_StridedShard(dim, split_factor=outer)``;
* ``TERM``: terms of a sum;
* ``FOREIGN``: not computed in the watched forward (a cache, a constant kept in a Python attribute),
  so nothing is known of it, and it is taken to fit what it is combined with;
* ``UNKNOWN``: computed by something that no rule follows.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from flex_model.layouts.layout import block_count, is_sharded, shard_dim

__all__ = ["FOREIGN", "TERM", "UNKNOWN", "WHOLE", "Cut", "Mark", "from_placement", "reviewed"]


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


Mark = Cut | _State


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


def reviewed(mark: Mark, before: Sequence[int], after: Sequence[int]) -> Mark:
    """The mark of ``tensor.view(after)``, from local shapes alone.

    Dims are matched in the smallest groups of equal size. Within its group a cut lies behind a
    number of unsharded leading entries, which a view does not change.

    >>> reviewed(Cut(2), (4, 5, 12), (4, 5, 3, 4))      # split heads: sharded heads
    Cut(dim=2, outer=1)
    >>> reviewed(Cut(1), (5, 4, 8), (20, 8))            # [sequence, batch] flattened
    Cut(dim=0, outer=5)
    """
    if not isinstance(mark, Cut):
        return mark
    if 0 in before or 0 in after:
        return mark if tuple(before) == tuple(after) else UNKNOWN
    for ins, outs in _groups(before, after):
        if mark.dim not in ins:
            continue
        leading = mark.outer * math.prod(before[d] for d in ins if d < mark.dim)
        for out in outs:
            if leading % after[out] == 0 and leading > 1:
                leading //= after[out]
            elif after[out] % leading == 0:
                return Cut(out, leading)
            else:
                return UNKNOWN
        return UNKNOWN
    return UNKNOWN


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Matching runs of dims ``(ins, outs)`` with equal products, as small as they can be."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        ins, outs = [i], [j]
        size_in, size_out = before[i], after[j]
        i, j = i + 1, j + 1
        while size_in != size_out:
            if size_in < size_out and i < len(before):
                size_in *= before[i]
                ins.append(i)
                i += 1
            elif j < len(after):
                size_out *= after[j]
                outs.append(j)
                j += 1
            else:
                return groups
        groups.append((ins, outs))
    return groups
