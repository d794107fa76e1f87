"""Aggregates and masks of activations that lie over several ranks.

Replicas (data-parallel ranks) each aggregate their own batches and are combined once, when a mask
is made. Over all other mesh dims an activation is one tensor: it stays cut where the functions
treat its slices each by itself, and is gathered along the dims where they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import reduce as fold

import torch
from torch import Tensor

from flex_model.core.local_shard import LocalShard
from flex_model.core.needs import needs_of
from flex_model.distributed.collectives import all_gather_along, all_reduce_sum, exchanged
from flex_model.errors import SparsityError
from flex_model.sparsity.aggregate import Aggregate, commutes
from flex_model.sparsity.functions import Functions

__all__ = ["Place", "made_mask", "over_replicas", "own_part"]

_REPLICAS = "dp"
_MOST_DIMS = 8


@dataclass(frozen=True)
class Place:
    """How an aggregate lies.

    Attributes:
        shard: of an activation that it is made of.
        cut: the tensor dims along which this rank holds a part only, replicas aside.
    """

    shard: LocalShard
    cut: frozenset[int]

    @classmethod
    def of(cls, shard: LocalShard) -> Place:
        """Of an activation as it lies on this rank."""
        dims = {dim for name, dim in shard.cut_dims.items() if name != _REPLICAS}
        return cls(shard, frozenset(dims))

    def kept(self, function: Callable[..., Tensor], but: Collection[int] = ()) -> Place:
        """What stays cut for a function, and but for some dims."""
        free = _independent(function, len(self.shard.shape)) - set(but)
        return Place(self.shard, self.cut & free)

    def whole(self) -> Place:
        """Nothing is cut any more."""
        return Place(self.shard, frozenset())

    def gathered(self, part: Tensor, to: Place) -> Tensor:
        """From this place to one with fewer cuts. Collective."""
        for dim in sorted(self.cut - to.cut):
            part = self.gathered_along(part, dim, dim)
        return part

    def gathered_along(self, part: Tensor, at: int, dim: int) -> Tensor:
        """A part that lies along dim ``at`` as the activation does along ``dim``, whole."""
        return self.shard.gathered(part, at, dim, over=_inner(self.shard))


def own_part(whole: Tensor, shard: LocalShard) -> Tensor:
    """This rank's slices of a tensor that broadcasts against one replica's activation."""
    extra = len(shard.shape) - whole.ndim
    for dim in sorted(Place.of(shard).cut):
        if dim >= extra and whole.shape[dim - extra] != 1:
            whole = shard.take(whole, dim - extra, dim, over=_inner(shard))
    return whole


def over_replicas(
    aggregate: Aggregate, place: Place, functions: Functions
) -> tuple[Aggregate, Place]:
    """The aggregate of all replicas' together. Collective.

    Raises:
        SparsityError: theirs have different shapes, and the reduction makes no sense of that.
    """
    if _REPLICAS not in place.shard.cut_dims:
        return aggregate, place
    group, join = place.shard.along(_REPLICAS), functions.combine or torch.add
    device = aggregate.data.device
    if len({*exchanged(_described(aggregate), device, group)}) > 1:
        aggregate, place, sound = _alike(aggregate, place, functions, join)
        told = exchanged([sound, *_described(aggregate)], device, group)
        if len({*told}) > 1 or not all(row[0] for row in told):
            raise SparsityError(
                f"data-parallel ranks aggregated batches of different shapes (here "
                f"{tuple(aggregate.shape)}), and combining them does not give the same before and "
                "after reduce_fn. Give all ranks batches of one shape; nothing is lost."
            )
    if functions.combine is None:
        data = all_reduce_sum(aggregate.data, group)
    else:
        parts = all_gather_along(aggregate.data.unsqueeze(0), 0, group)
        data = fold(functions.combine, parts.unbind(0))
    return Aggregate(data, aggregate.shape, aggregate.reduced), place


def made_mask(
    aggregate: Aggregate, place: Place, functions: Functions, config: dict[str, object]
) -> Tensor:
    """The whole mask, on shards as far as the functions allow it. Collective."""
    statistic, cuts = _statistic(aggregate, place, functions)
    if not {*cuts.values()} <= _independent(functions.mask, statistic.ndim):
        statistic, cuts = _whole(statistic, place, cuts), {}
    mask = functions.mask(statistic, **config)
    if not isinstance(mask, Tensor):
        raise SparsityError(f"mask_fn must return a tensor, got {type(mask).__name__}.")
    return _whole(mask, place, cuts).detach()


def _statistic(
    aggregate: Aggregate, place: Place, functions: Functions
) -> tuple[Tensor, dict[int, int]]:
    """The statistic, and where it is still cut: the activation's dims with its own."""
    if aggregate.reduced:
        return aggregate.data, {}
    data, kept = aggregate.data, place.kept(functions.reduce)
    data = place.gathered(data, kept)
    found = functions.reduce(data)
    extra = data.ndim - found.ndim
    cuts = {dim: dim - extra for dim in kept.cut}
    if all(at >= 0 and found.shape[at] == data.shape[dim] for dim, at in cuts.items()):
        return found, cuts
    # A dim that is cut was reduced, or does not stand where broadcasting would look for it.
    return functions.reduce(kept.gathered(data, kept.whole())), {}


def _whole(part: Tensor, place: Place, cuts: dict[int, int]) -> Tensor:
    for dim, at in cuts.items():
        part = place.gathered_along(part, at, dim)
    return part


def _alike(
    aggregate: Aggregate, place: Place, functions: Functions, join: Callable[..., Tensor]
) -> tuple[Aggregate, Place, bool]:
    """The statistic, which replicas have in one shape, and whether it may be joined in place of
    the aggregate.
    """
    data = place.gathered(aggregate.data, place.whole())
    sound = aggregate.reduced or commutes(join, functions.reduce, data, data.flip(0) * -0.5)
    whole = Aggregate(data, aggregate.shape, aggregate.reduced)
    return whole.statistic(functions), place.whole(), sound


def _described(aggregate: Aggregate) -> list[int]:
    sizes = list(aggregate.data.shape)
    return [int(aggregate.reduced), *sizes, *[-1] * (_MOST_DIMS - len(sizes))]


def _inner(shard: LocalShard) -> list[str]:
    return [name for name in shard.cut_dims if name != _REPLICAS]


def _independent(function: Callable[..., Tensor], ndim: int) -> set[int]:
    """The dims along which a function treats slices each by itself, and keeps them."""
    needs = needs_of(function)
    return needs.independent(ndim) - needs.reduced(ndim)
