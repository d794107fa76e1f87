"""Traffic as one hook causes it: what is exchanged beyond the bare model's, over the hooks."""

from __future__ import annotations

from dataclasses import dataclass

from hooks.measure import Measured
from hooks.settings import INNER, TWO_RANKS

__all__ = ["ONE_ALL_GATHER", "PerHook", "agreement", "per_hook"]

_FLOAT32 = 4


@dataclass(frozen=True)
class PerHook:
    """What one hook exchanges in one half of a step.

    Attributes:
        collectives: how many of each kind a rank takes part in.
        received: bytes that arrive from other ranks, over all ranks.
    """

    collectives: dict[str, float]
    received: float

    def __str__(self) -> str:
        if not self.collectives:
            return "nothing"
        named = ", ".join(f"{count:g} {name}" for name, count in self.collectives.items())
        return f"{named}, {self.received / 1024:g} KiB"


def _of_one_all_gather() -> PerHook:
    shard = TWO_RANKS.batch * TWO_RANKS.length * INNER // TWO_RANKS.ranks * _FLOAT32
    return PerHook({"all-gather": 1}, TWO_RANKS.ranks * (TWO_RANKS.ranks - 1) * shard)


ONE_ALL_GATHER = _of_one_all_gather()


def per_hook(measured: Measured, way: str, half: str) -> PerHook:
    """The activations' traffic of one way, in "forward" or "backward"."""
    hooked, bare = measured.traffic[way][half], measured.traffic["bare"][half]
    beyond = hooked[0].collectives - bare[0].collectives
    received = sum(rank.received for rank in hooked) - sum(rank.received for rank in bare)
    hooks = len(TWO_RANKS.hooked)
    return PerHook({name: count / hooks for name, count in beyond.items()}, received / hooks)


def agreement(measured: Measured, way: str) -> str:
    """What the ranks exchange to agree on, in a whole step with all its hooks."""
    halves = measured.traffic[way].values()
    count = sum(half[0].agreements for half in halves)
    received = sum(rank.agreement_received for half in halves for rank in half)
    return f"{count:g}, {received:g} B" if count else "nothing"
