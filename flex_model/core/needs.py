"""What an editing function needs of the tensor: declared, so that nothing is moved in vain.

An editing function that says nothing gets the whole tensor. One that treats entries, channels or
tokens each by itself gives the same result shard by shard; it says so, and costs no byte on the
wire where the shard suffices:

    @elementwise
    def steer(current_module, inputs, save_ctx, modules):
        return inputs + 0.5 * modules["direction"](inputs.new_ones(()))

    @channelwise                                   # each feature by itself, over all tokens
    def scale(current_module, inputs, save_ctx, modules, *, shard):
        return inputs * shard.take(modules["scale"].weight)

    @reduces("sum", over=(0, 1))                   # a statistic: recorded in the activation's place
    def energy(current_module, inputs, save_ctx, modules):
        return inputs.square().sum((0, 1))

    @observes                                      # looks at the shard, edits and returns nothing
    def count(current_module, inputs, save_ctx, modules, *, shard):
        save_ctx.zeros += (inputs == 0).sum()

A function that takes a keyword ``shard`` is told which part it holds (`LocalShard`). FlexModel's
``debug=True`` runs every declared function on the whole tensor as well and names those that
claimed too much.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from flex_model.errors import ConfigurationError
from flex_model.layouts.layout import ActivationLayout, DimLayout, is_sharded, shard_dim

__all__ = ["WHOLE", "Combine", "Needs", "channelwise", "elementwise", "needs_of", "observes"]
__all__ += ["reduces", "tokenwise"]

Combine = Literal["sum", "mean", "max", "min"]
Function = TypeVar("Function", bound=Callable[..., Any])
_COMBINES = ("sum", "mean", "max", "min")
_ATTRIBUTE = "needs"


@dataclass(frozen=True)
class Needs:
    """Along which tensor dims a function treats slices independently, and how its results combine.

    Attributes:
        along: tensor dims, negative ones counted from the end; ``but`` turns them into all others.
        but: whether ``along`` names the dims that the function needs whole.
        combine: how a statistic's results on slices of the dims in ``over`` make the whole one's;
            None for an edit.
        over: tensor dims that a statistic reduces.
        observes: whether the function only looks: it runs once a forward, and returns nothing.
    """

    along: tuple[int, ...] = ()
    but: bool = False
    combine: Combine | None = None
    over: tuple[int, ...] = ()
    observes: bool = False

    def independent(self, ndim: int) -> set[int]:
        """The dims of a tensor of so many dims along which a shard suffices."""
        named = {dim % ndim for dim in self.along}
        found = set(range(ndim)) - named if self.but else named
        return found | self.reduced(ndim)

    def reduced(self, ndim: int) -> set[int]:
        """The dims that a statistic of such a tensor has no more."""
        return {dim % ndim for dim in self.over}

    def split(
        self, layout: ActivationLayout, ndim: int
    ) -> tuple[ActivationLayout, ActivationLayout]:
        """The mesh dims to gather over, and those over which the function works on its shard."""
        if self == WHOLE:
            return layout, ActivationLayout(())
        free = self.independent(ndim)

        def suffices(dim: DimLayout) -> bool:
            return is_sharded(dim.value) and shard_dim(dim.value) % ndim in free  # type: ignore[arg-type]

        # Blocks of a dim that two mesh dims cut are counted with both: they go together.
        bound = {_cut(dim) for dim in layout.dims if is_sharded(dim.value) and not suffices(dim)}
        local = [dim for dim in layout.dims if suffices(dim) and _cut(dim) not in bound]
        rest = [dim for dim in layout.dims if dim not in local]
        return ActivationLayout(tuple(rest)), ActivationLayout(tuple(local))


WHOLE = Needs()


def _cut(dim: DimLayout) -> int | None:
    return shard_dim(dim.value) if dim.value is not None and is_sharded(dim.value) else None


def elementwise(function: Function) -> Function:
    """Declare that a function treats every entry by itself: any shard suffices."""
    return _declared(function, Needs(but=True))


def channelwise(function: Function) -> Function:
    """Declare that a function treats the slices of the last dim each by itself."""
    return _declared(function, Needs(along=(-1,)))


def tokenwise(function: Function) -> Function:
    """Declare that a function treats the vectors along the last dim each by itself."""
    return _declared(function, Needs(along=(-1,), but=True))


def observes(function: Function) -> Function:
    """Declare that a function looks at this rank's shard, and edits and records nothing.

    It is called once in each forward, detached from the autograd graph (not again when activation
    checkpointing recomputes one), before the edits. What it returns is dropped. Terms of a sum are
    added up for it; nothing else is moved.
    """
    return _declared(function, Needs(but=True, observes=True))


def reduces(combine: Combine, over: Collection[int]) -> Callable[[Function], Function]:
    """Declare a statistic: what the function returns is recorded, the activation stays.

    Args:
        combine: how results on slices of the reduced dims combine: "sum", "mean", "max" or "min".
        over: tensor dims that the function reduces (with or without ``keepdim``). Slices along the
            others are treated each by itself.

    Raises:
        ConfigurationError: no such combination.
    """
    if combine not in _COMBINES:
        raise ConfigurationError(f"A statistic combines by one of {_COMBINES}, not {combine!r}.")
    return lambda function: _declared(function, Needs((), True, combine, tuple(over)))


def needs_of(function: Callable[..., Any]) -> Needs:
    """What a function declared, or the whole tensor."""
    declared = getattr(function, _ATTRIBUTE, WHOLE)
    return declared if isinstance(declared, Needs) else WHOLE


def _declared(function: Function, needs: Needs) -> Function:
    setattr(function, _ATTRIBUTE, needs)
    return function
