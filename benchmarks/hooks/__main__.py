"""`scripts/bench hooks`: measures, then prints tables of times, of traffic and of targets."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from environments import borrowing_python
from hooks.measure import Measured, measure
from hooks.report import one_process_table, targets_table, times_table, traffic_table
from hooks.settings import HIDDEN, INNER, LAYERS, ONE_PROCESS, TWO_RANKS, VERSION
from hooks.targets import targets

OURS, ORIGINAL = "this library", f"flex-model {VERSION}"


def main() -> None:
    """Runs the benchmark; a missed target is told, not an error, for machines differ."""
    console = Console()
    load, _, _ = os.getloadavg()
    pythons = {OURS: Path(sys.executable), ORIGINAL: _original()}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        alone = measure(ONE_PROCESS, pythons, progress)
        together = measure(TWO_RANKS, pythons, progress)
    _introduce(console, alone[OURS], load)
    tables = (
        one_process_table("forward", "a forward", alone[OURS], alone[ORIGINAL]),
        one_process_table("step", "with backward", alone[OURS], alone[ORIGINAL]),
        times_table(together[OURS], together[ORIGINAL]),
        traffic_table(together[OURS], together[ORIGINAL]),
        targets_table(targets(alone[OURS], together[OURS])),
    )
    for table in tables:
        console.print("\n", table)


def _original() -> Path:
    return borrowing_python(f"flex-model-{VERSION}", [f"flex-model=={VERSION}"])


def _introduce(console: Console, measured: Measured, load: float) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in measured.facts.items())
    console.print(
        f"{versions}, Python {platform.python_version()}\n"
        f"{os.cpu_count()} cores, load average {load:.1f} before the start\n"
        f"Llama, random weights: hidden {HIDDEN}, inner {INNER}, {LAYERS} layers, float32, CPU\n"
        "Medians over rounds in which everything runs once, ± half the distance between the "
        "quartiles; ratios are taken in each round."
    )


if __name__ == "__main__":
    main()
