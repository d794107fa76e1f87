"""What is done to one weight: steps along one dim each, with the steps that take them back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flex_model.compress.spinquant.orthogonal import Rotation
from flex_model.compress.spinquant.sharded import Cut, is_local, local_of, turn

__all__ = ["Centre", "Scale", "Shift", "Step", "Turn", "Weight"]


class Step(Protocol):
    """A change along ``dim`` of a tensor of which this rank holds what ``cut`` tells."""

    @property
    def dim(self) -> int: ...

    def is_local(self, cut: Cut | None) -> bool:
        """Whether it can be done without the whole dim."""

    def apply(self, x: Tensor, cut: Cut | None) -> tuple[Tensor, Step]:
        """The changed tensor, and the step that takes this one back."""


@dataclass(frozen=True, eq=False)
class Turn:
    """``x R`` along ``dim``; see `sharded.turn`."""

    dim: int
    rotation: Rotation
    positions: Tensor | None = None

    def is_local(self, cut: Cut | None) -> bool:
        return is_local(self.rotation, cut, self.positions)

    def apply(self, x: Tensor, cut: Cut | None) -> tuple[Tensor, Step]:
        back = Turn(self.dim, self.rotation.inverse, self.positions)
        return turn(x, self.dim, self.rotation, cut, self.positions), back


@dataclass(frozen=True, eq=False)
class Scale:
    """Each entry along ``dim`` times its factor.

    Attributes:
        factors: ``[whole length]``.
        lost: what stood where a factor that was taken back is 0, as columns; None if nothing.
    """

    dim: int
    factors: Tensor
    lost: Tensor | None = None

    def is_local(self, cut: Cut | None) -> bool:
        return True

    def apply(self, x: Tensor, cut: Cut | None) -> tuple[Tensor, Step]:
        own = (self.factors if cut is None else cut.part(self.factors, 0)).to(x)
        rows = x.movedim(self.dim, -1)
        scaled = rows * own
        if self.lost is not None:
            scaled[..., own == 0] = self.lost.to(x)
            return scaled.movedim(-1, self.dim), self
        back = torch.where(self.factors == 0, 0.0, 1 / self.factors)
        lost = rows[..., own == 0].clone()
        return scaled.movedim(-1, self.dim), Scale(self.dim, back, lost)


@dataclass(frozen=True, eq=False)
class Centre:
    """Each slice along ``dim`` minus its mean."""

    dim: int

    def is_local(self, cut: Cut | None) -> bool:
        return cut is None

    def apply(self, x: Tensor, cut: Cut | None) -> tuple[Tensor, Step]:
        mean = x.mean(self.dim, keepdim=True)
        return x - mean, Shift(mean)


@dataclass(frozen=True, eq=False)
class Shift:
    """Plus this rank's part of a tensor."""

    amount: Tensor
    dim: int = 0

    def is_local(self, cut: Cut | None) -> bool:
        return True

    def apply(self, x: Tensor, cut: Cut | None) -> tuple[Tensor, Step]:
        return x + self.amount.to(x), Shift(-self.amount)


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter, as far as this rank holds it.

    Attributes:
        name: plain.
        parameter: is written in place, so whoever holds it (an optimizer, FSDP) has the new values.
        cuts: by dim.
    """

    name: str
    parameter: Tensor
    cuts: tuple[Cut | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        local = local_of(self.parameter).shape
        return tuple(n if c is None else c.length for n, c in zip(local, self.cuts, strict=True))

    @torch.no_grad()
    def whole(self, precision: torch.dtype = torch.float64) -> Tensor:
        """All of it. Collective where it is cut."""
        values = local_of(self.parameter).to(precision)
        for dim, cut in enumerate(self.cuts):
            values = values if cut is None else cut.gathered(values, dim)
        return values

    @torch.no_grad()
    def change(self, steps: Sequence[Step], precision: torch.dtype) -> list[Step]:
        """Take steps at some precision, round once, and return those that take them back.

        A dim that some step needs whole is gathered once. Collective then.
        """
        local, cuts = local_of(self.parameter), list(self.cuts)
        values = local.to(precision)
        for dim, cut in enumerate(self.cuts):
            if cut is not None and not all(s.is_local(cut) for s in steps if s.dim == dim):
                values, cuts[dim] = cut.gathered(values, dim), None
        back: list[Step] = []
        for step in steps:
            values, inverse = step.apply(values, cuts[step.dim])
            back.insert(0, inverse)
        for dim, cut in enumerate(self.cuts):
            if cut is not None and cuts[dim] is None:
                values = cut.part(values, dim)
        local.copy_(values)
        return back
