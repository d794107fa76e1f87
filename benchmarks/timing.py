"""Ways of doing one thing, timed in turn: what drifts on the machine drifts for all of them."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

__all__ = ["Round", "Seconds", "Way", "time_rounds"]

Seconds = dict[str, float]  # by phase, such as "forward"
Round = dict[str, Seconds]  # by way
Way = Callable[[], Seconds]


def time_rounds(ways: Mapping[str, Way], rounds: int, order: random.Random) -> list[Round]:
    """Run every way once per round, in an order that is drawn anew for each.

    Args:
        ways: what to compare; each runs once when called and tells the seconds of its phases.
        rounds: how many.
        order: draws the orders; ranks that work together seed it alike.
    """
    timed = []
    with _no_garbage_collection():
        for _ in range(rounds):
            names = list(ways)
            order.shuffle(names)
            timed.append({name: ways[name]() for name in names})
    return timed


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """As in ``timeit``: a collection falls on whichever way happens to run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
