"""What rounds of timings come to: medians, how sure they are, and how widely the rounds spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from timing import Round

__all__ = ["Figure", "differences", "ratios", "times"]


@dataclass(frozen=True)
class Figure:
    """A median over rounds.

    Attributes:
        median: of the rounds' values.
        quartiles: between them lies half of the rounds.
        interval: between them lies the true median, in 95 of 100 such measurements.
    """

    median: float
    quartiles: tuple[float, float]
    interval: tuple[float, float]

    @classmethod
    def of(cls, values: Iterable[float]) -> Figure:
        ordered = sorted(values)
        low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
        # How many of n rounds fall below the median is binomial, with a deviation of sqrt(n) / 2.
        reach = math.ceil(1.96 * math.sqrt(len(ordered)) / 2)
        middle = len(ordered) // 2
        below, above = max(0, middle - reach), min(len(ordered) - 1, middle + reach)
        return cls(median, (low, high), (ordered[below], ordered[above]))


def times(rounds: Sequence[Round], way: str, phase: str) -> Figure:
    """Seconds of one way."""
    return Figure.of(timed[way][phase] for timed in rounds)


def ratios(rounds: Sequence[Round], way: str, base: str, phase: str) -> Figure:
    """One way's time over another's in the same round: in pairs, drift cancels."""
    return Figure.of(timed[way][phase] / timed[base][phase] for timed in rounds)


def differences(rounds: Sequence[Round], way: str, base: str, phase: str) -> Figure:
    """Seconds of one way beyond another's in the same round."""
    return Figure.of(timed[way][phase] - timed[base][phase] for timed in rounds)
