"""What has been seen of one layer's (or one feature's) activations since the last mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flex_model.errors import SparsityError
from flex_model.sparsity.functions import Functions

__all__ = ["Aggregate", "accurate", "commutes"]

_TOLERANCE = 1e-4  # float32 sums in another order, far below what a wrong exchange does


@dataclass(frozen=True)
class Aggregate:
    """An aggregate of activations, in float32 or float64.

    A batch of another shape than the first (the last of an epoch, a longer sequence) can be taken
    in where reducing and aggregating may change places: then statistics are aggregated from there
    on, in place of activations. Whether they may is tried on the numbers at hand.

    Attributes:
        data: the aggregate, or the statistic.
        shape: of the activations it is made of.
        reduced: whether ``data`` is a statistic already.
    """

    data: Tensor
    shape: torch.Size
    reduced: bool = False

    @classmethod
    def first(cls, x: Tensor, functions: Functions, zero_start: bool) -> Aggregate:
        """Of one activation: itself, or (torch's way) what is made of zeros and it."""
        data = functions.aggregate(torch.zeros_like(x), x) if zero_start else x.clone()
        return cls(data, x.shape)

    def fits(self, x: Tensor, functions: Functions) -> bool:
        """Whether an activation is aggregated as it is: shaped as before, or concatenated."""
        return x.shape == self.shape or self._concatenated(x, functions) is not None

    def plus(self, x: Tensor, functions: Functions) -> Aggregate:
        """With one more activation that `fits`."""
        if x.shape == self.shape:
            return replace(self, data=functions.aggregate(self.data, x))
        grown = self._concatenated(x, functions)
        return self.plus_ragged(x, functions) if grown is None else replace(self, data=grown)

    def plus_ragged(self, x: Tensor, functions: Functions) -> Aggregate:
        """With one more activation of another shape; both are whole, but for the batch.

        Raises:
            SparsityError: the reduction makes no sense of it.
        """
        own = self if self.reduced else self.statistic(functions)
        term = functions.reduce(x)
        if term.shape != own.data.shape:
            raise SparsityError(
                f"an activation {tuple(x.shape)} came after one of {tuple(self.shape)}, and "
                f"reduce_fn makes {tuple(own.data.shape)} of what was aggregated but "
                f"{tuple(term.shape)} of the new one. Reduce the dims in which batches differ, or "
                "drop the ragged batch; nothing of the aggregate is lost."
            )
        if not self.reduced and not self._may_reduce_first(x, functions):
            raise SparsityError(
                f"an activation {tuple(x.shape)} came after one of {tuple(self.shape)}, and "
                "aggregate_fn does not give the same before and after reduce_fn, so no aggregate "
                "of both has a meaning. Drop the ragged batch; nothing of the aggregate is lost."
            )
        return replace(own, data=functions.aggregate(own.data, term))

    def statistic(self, functions: Functions) -> Aggregate:
        """Reduced."""
        return (
            self if self.reduced else replace(self, data=functions.reduce(self.data), reduced=True)
        )

    def _concatenated(self, x: Tensor, functions: Functions) -> Tensor | None:
        """Both one after the other, if that is what the function does."""
        if self.reduced or x.ndim != self.data.ndim:
            return None
        try:
            grown = functions.aggregate(self.data, x)
        except (RuntimeError, ValueError, IndexError):
            return None
        return grown if grown.numel() == self.data.numel() + x.numel() else None

    def _may_reduce_first(self, x: Tensor, functions: Functions) -> bool:
        if x.ndim != self.data.ndim:
            return False
        first, second = self.data, x
        for dim in range(x.ndim):
            length = min(first.shape[dim], second.shape[dim])
            first, second = first.narrow(dim, 0, length), second.narrow(dim, 0, length)
        return commutes(functions.aggregate, functions.reduce, first, second)


def accurate(x: Tensor) -> Tensor:
    """Detached, in a dtype whose sums do not stall: float64 stays, all else becomes float32."""
    x = x.detach()
    return x if x.dtype == torch.float64 else x.float()


def commutes(
    join: Callable[[Tensor, Tensor], Tensor],
    reduce: Callable[[Tensor], Tensor],
    first: Tensor,
    second: Tensor,
) -> bool:
    """Whether two tensors' statistics, joined, are the statistic of the joined tensors."""
    after, before = reduce(join(first, second)), join(reduce(first), reduce(second))
    if after.shape != before.shape:
        return False
    return torch.allclose(
        after.double(), before.double(), rtol=_TOLERANCE, atol=_TOLERANCE * _scale(after)
    )


def _scale(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
