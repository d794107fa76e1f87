"""Asking the workers: both libraries in short turns, so that what drifts drifts for both."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from hooks.settings import Setting
from hooks.traffic import Traffic
from hooks.workers import Workers, started
from timing import Round

__all__ = ["Measured", "measure"]

_TURNS = 12
_ROUNDS = 25  # a turn
_BEGINNINGS = 4  # a turn; each runs the whole model
_SECONDS = 60.0  # of turns; a machine that is busy elsewhere gets fewer of them


@dataclass
class Measured:
    """What one library's workers told in one setting.

    Attributes:
        facts: versions of what was imported.
        rounds: times of each way; over ranks, of the slowest one.
        beginnings: the same, of what comes before a forward's first module.
        traffic: of each rank, by way and half of a step.
    """

    facts: Mapping[str, str]
    rounds: list[Round] = field(default_factory=list)
    beginnings: list[Round] = field(default_factory=list)
    traffic: Mapping[str, Mapping[str, list[Traffic]]] = field(default_factory=dict)


def measure(
    setting: Setting, pythons: Mapping[str, Path], progress: Progress
) -> dict[str, Measured]:
    """Time every library in one setting.

    Args:
        setting: what to measure.
        pythons: by library, the interpreter that imports it.
        progress: is shown every turn.

    Returns:
        By library, what was measured.

    Raises:
        WorkerError: a library does not run the setting.
    """
    bar = progress.add_task(f"{setting.name}: starting the workers", total=_TURNS)
    with ExitStack() as stack:
        workers = {
            library: stack.enter_context(started(python, setting))
            for library, python in pythons.items()
        }
        found = {library: Measured(own.facts()) for library, own in workers.items()}
        progress.update(bar, description=f"{setting.name}: timing in turns")
        deadline = time.monotonic() + _SECONDS
        for turn in range(_TURNS):
            if turn and time.monotonic() > deadline:
                break
            for library, own in workers.items():
                _take_turn(own, found[library], whole_model=setting.ranks > 1)
            progress.advance(bar)
        if setting.ranks > 1:
            for library, own in workers.items():
                found[library].traffic = _traffic(own.ask(what="traffic"))
    return found


def _take_turn(workers: Workers, measured: Measured, whole_model: bool) -> None:
    measured.rounds += _slowest(workers.ask(what="time", rounds=_ROUNDS))
    if whole_model:
        answers = workers.ask(what="time beginnings", rounds=_BEGINNINGS)
        measured.beginnings += _slowest(answers)


def _slowest(by_rank: list[list[Round]]) -> list[Round]:
    """Each round as long as its last rank took."""
    return [
        {
            way: {phase: max(rank[way][phase] for rank in same_round) for phase in phases}
            for way, phases in same_round[0].items()
        }
        for same_round in zip(*by_rank, strict=True)
    ]


def _traffic(by_rank: list[Any]) -> dict[str, dict[str, list[Traffic]]]:
    return {
        way: {half: [Traffic.decoded(rank[way][half]) for rank in by_rank] for half in halves}
        for way, halves in by_rank[0].items()
    }
