"""How much of a dimension is left: by ratio, by size, or by what the whole model may have."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import floor
from typing import TypedDict

from flex_model.errors import PruningError
from flex_model.pruning.dimensions import Dimension, Dimensions

__all__ = ["Target", "Targets", "sizes_for"]

# Of products such as 100 * 0.29, which come out a little below what was meant.
_SLACK = 1e-9

Sizes = dict[str, int]


@dataclass(frozen=True)
class Target:
    """How much of one dimension is left. Give one of the first three.

    The size is the same in all layers, for a config has one number for all of them: a ratio is that
    of each layer, and channels compete with those of their own layer only.

    Attributes:
        ratio: share that is cut, from 0 to 1: of n indexes ``floor(n * ratio)`` go.
        size: indexes that are left.
        parameters: the most that the whole model may have afterwards. Dimensions that are given
            the same number share the least ratio that meets it.
        multiple_of: sizes found from a ratio or a budget are rounded up to a multiple of this, so
            that they divide over ranks, or suit a device.

    Raises:
        PruningError: none or several of them, a ratio outside [0, 1], a number below 1.

    Examples:
        >>> Target(ratio=0.25).left(512)
        384
        >>> Target(ratio=0.3, multiple_of=64).left(512)
        384
    """

    ratio: float | None = None
    size: int | None = None
    parameters: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        given = [v for v in (self.ratio, self.size, self.parameters) if v is not None]
        if len(given) != 1:
            raise PruningError(
                "A target is one of ratio, size and parameters, got "
                f"ratio={self.ratio}, size={self.size}, parameters={self.parameters}."
            )
        if self.ratio is not None and not (_is_number(self.ratio) and 0 <= self.ratio <= 1):
            raise PruningError(f"A ratio is a number from 0 to 1, got {self.ratio!r}.")
        for name in ("size", "parameters", "multiple_of"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise PruningError(f"{name} is a whole number, got {value!r}.")
            if value is not None and value < (0 if name == "size" else 1):
                raise PruningError(f"{name} is positive, got {value}.")

    def left(self, size: int) -> int:
        """Indexes left of ``size``, where the target is a ratio or a size."""
        if self.size is not None:
            return self.size
        return _left(size, self.ratio or 0.0, self.multiple_of)


class Targets(TypedDict, total=False):
    """Targets by dimension, as keywords; None leaves a dimension as it is."""

    ffn: Target | None
    kv_heads: Target | None
    hidden: Target | None
    layers: Target | None
    experts: Target | None


def sizes_for(
    dimensions: Dimensions,
    targets: Mapping[Dimension, Target],
    smallest: Mapping[str, int],
    parameters: Callable[[Mapping[str, int]], int],
) -> Sizes:
    """The size of each config field that a target is about.

    Args:
        dimensions: of the model.
        targets: by dimension.
        smallest: the least size of fields that must keep more than one index.
        parameters: the whole model's parameters with given sizes.

    Raises:
        PruningError: a size that is not between 1 (or the smallest) and what there is, several
            fields for one size, or a budget that cannot be met.
    """
    fields = {name: dimensions.fields(name) for name in targets}
    for name, target in targets.items():
        _check_fields(name, target, fields[name])
    sizes = {
        field: target.left(size)
        for name, target in targets.items()
        if target.parameters is None
        for field, size in fields[name].items()
    }
    within = {n: t for n, t in targets.items() if t.parameters is not None}
    sizes |= _within_budget(within, fields, sizes, smallest, parameters)
    for name in targets:
        for field, size in fields[name].items():
            _check_size(field, sizes[field], size, smallest.get(field, 1))
    return sizes


def _within_budget(
    targets: Mapping[Dimension, Target],
    fields: Mapping[Dimension, Mapping[str, int]],
    others: Sizes,
    smallest: Mapping[str, int],
    parameters: Callable[[Mapping[str, int]], int],
) -> Sizes:
    """The sizes of the least common ratio that meets the budget, the others being settled."""
    if not targets:
        return {}
    budgets = {target.parameters for target in targets.values()}
    if len(budgets) > 1:
        raise PruningError(f"A model has one budget of parameters, got {sorted(budgets, key=str)}.")
    budget = budgets.pop() or 0

    def at(ratio: float) -> Sizes:
        return {
            field: max(_left(size, ratio, target.multiple_of), smallest.get(field, 1))
            for name, target in targets.items()
            for field, size in fields[name].items()
        }

    lengths = {size for name in targets for size in fields[name].values()}
    ratios = sorted({cut / size for size in lengths for cut in range(size)})
    # Counted downwards, so that what meets the budget lies behind what does not.
    found = bisect_left(ratios, -budget, key=lambda ratio: -parameters({**others, **at(ratio)}))
    if found == len(ratios):
        least = parameters({**others, **at(ratios[-1])})
        raise PruningError(
            f"A budget of {budget} parameters cannot be met by cutting {', '.join(targets)}: "
            f"at least {least} are left. Cut other dimensions too, or raise the budget."
        )
    return at(ratios[found])


def _left(size: int, ratio: float, multiple_of: int) -> int:
    left = size - floor(size * ratio + _SLACK)
    return min(size, -(-left // multiple_of) * multiple_of)


def _check_fields(name: Dimension, target: Target, fields: Mapping[str, int]) -> None:
    if not fields:
        raise PruningError(f"The model has no {name} that could be cut.")
    if target.size is not None and len(fields) > 1:
        raise PruningError(
            f"One size for {name} is not enough: the model has {dict(fields)}. Give a ratio."
        )


def _check_size(field: str, left: int, size: int, smallest: int) -> None:
    if left == 0:
        raise PruningError(f"Everything would be pruned: of {field}={size} nothing is left.")
    if not smallest <= left <= size:
        raise PruningError(
            f"{field} can be cut to a size from {smallest} to {size}, which it is, not to {left}."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
