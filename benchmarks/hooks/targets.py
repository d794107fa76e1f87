"""What is to be reached, and whether it is."""

from __future__ import annotations

from dataclasses import dataclass

from figures import Figure, ratios
from hooks.measure import Measured
from hooks.per_hook import ONE_ALL_GATHER, per_hook

__all__ = ["Target", "targets"]


@dataclass(frozen=True)
class Target:
    """One figure to reach.

    Attributes:
        what: in words.
        due: the figure.
        measured: what it came to.
        verdict: "met", "missed", or "open" where more rounds would have to tell.
    """

    what: str
    due: str
    measured: str
    verdict: str


def targets(one_process: Measured, two_ranks: Measured) -> list[Target]:
    """Every target of this library, with what was measured."""
    rounds = one_process.rounds
    return [
        _at_most(
            "1 rank: retrieve / torch",
            1.15,
            ratios(rounds, "retrieve", "raw retrieve", "forward"),
        ),
        _at_most(
            "1 rank: idle / no hooks",
            1.02,
            ratios(rounds, "idle", "bare", "forward"),
        ),
        _at_most(
            "2 ranks: retrieve / torch",
            1.00,
            ratios(two_ranks.rounds, "retrieve", "gather by hand", "forward"),
        ),
        *(_one_all_gather(two_ranks, half) for half in ("forward", "backward")),
    ]


def _at_most(what: str, due: float, ratio: Figure) -> Target:
    low, high = ratio.interval
    verdict = "met" if ratio.median <= due else "open" if low <= due else "missed"
    measured = f"{ratio.median:.3f} ({low:.3f}-{high:.3f})"
    return Target(what, f"<= {due:.2f}", measured, verdict)


def _one_all_gather(measured: Measured, half: str) -> Target:
    found = per_hook(measured, "edit", half)
    what = f"2 ranks: edit, {half}"
    verdict = "met" if found == ONE_ALL_GATHER else "missed"
    return Target(what, str(ONE_ALL_GATHER), str(found), verdict)
