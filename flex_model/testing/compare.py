"""How far two tensors lie apart, in the one measure that every test of this library uses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Measurement", "relative_error"]


@dataclass(frozen=True)
class Measurement:
    """One number of a parity grid.

    Attributes:
        column: the column that the number counts for.
        site: the hook point, as ``module name[index]``.
        hint: whether the hook was given an ``expected_shape``.
        quantity: what was compared, such as ``record`` or ``weight grad``.
        error: the relative error against one process.
        tolerance: the largest error that passes.
        hard: which of the hard sites it was measured at, if one.
        note: the tensor with that error, where many were compared; or what was raised.
    """

    column: str
    site: str
    hint: bool
    quantity: str
    error: float
    tolerance: float
    hard: str = ""
    note: str = ""

    @property
    def passes(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        where = f"{self.column} at {self.site}, {'with a hint' if self.hint else 'no hint'}"
        note = f" ({self.note})" if self.note else ""
        return f"{where}: {self.quantity}, relative error {self.error:.1e}{note}"


def relative_error(actual: Tensor | None, expected: Tensor | None) -> float:
    """``max|actual - expected| / max|expected|``.

    Where ``expected`` is zero throughout, ``max|actual|``. A tensor that is missing on one side, of
    another shape, or holds a NaN is infinitely far away, so that no comparison passes by accident.
    """
    if actual is None or expected is None:
        return 0.0 if actual is expected else math.inf
    if actual.shape != expected.shape:
        return math.inf
    if actual.numel() == 0:
        return 0.0
    wide = torch.promote_types(torch.promote_types(actual.dtype, expected.dtype), torch.float64)
    actual, expected = actual.detach().to(wide), expected.detach().to(wide)
    difference = float((actual - expected).abs().max())
    scale = float(expected.abs().max())
    error = difference / scale if scale else float(actual.abs().max())
    return error if math.isfinite(error) else math.inf
