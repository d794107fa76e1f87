"""Measures and prints; run under an interpreter that imports both libraries."""

from __future__ import annotations

import os
import random
from importlib.metadata import version

import torch
from rich.console import Console
from rich.table import Table

from figures import Figure, ratios, times
from flex_model.testing.ranks import run_ranks
from importance.one_process import KINDS, LIBRARIES, SHAPE, peak, ways
from importance.two_ranks import measured
from timing import time_rounds

ROUNDS = 15
OURS, THEIRS = LIBRARIES
# At most so much of ModelOpt's, as the project promises.
TIME = {"L2": 1.0, "Independent": 1.0, "Iterative": 0.5, "Iterative, scaled": 0.5}
MEMORY = {"Iterative": 0.25, "Iterative, scaled": 0.25}
OVER_BARE = 1.08


def main() -> None:
    """One process, then two ranks."""
    console = Console(width=120)
    torch.set_num_threads(1)
    load, _, _ = os.getloadavg()
    console.print(
        f"torch {version('torch')}, nvidia-modelopt {version('nvidia-modelopt')}, "
        f"megatron-core {version('megatron-core')}; load average {load:.1f} before the start\n"
        f"a 2048 -> 512 layer on {[*SHAPE, 2048]} tokens, float32, one thread; medians of {ROUNDS} "
        "rounds in which everything runs once, ± half the distance between the quartiles"
    )
    console.print(_one_process())
    console.print(_two_ranks())


def _one_process() -> Table:
    rounds = time_rounds(ways(), ROUNDS, random.Random(0))
    table = Table("hook, per call", "ms", "x bare layer", "ModelOpt ms", "x bare layer",
                  "time to ModelOpt's", "promised", "peak, inputs", "ModelOpt",
                  title="one process")  # fmt: skip
    bare = times(rounds, "bare", "call")
    table.add_row("(bare layer)", _ms(bare))
    for kind in KINDS:
        ours, theirs = f"{OURS}: {kind}", f"{THEIRS}: {kind}"
        memory, other = peak(OURS, kind), peak(THEIRS, kind)
        promised = f"<= {TIME[kind]}" + (f", memory <= {MEMORY[kind]}" if kind in MEMORY else "")
        table.add_row(
            kind,
            _ms(times(rounds, ours, "call")),
            _ratio(ratios(rounds, ours, "bare", "call")),
            _ms(times(rounds, theirs, "call")),
            _ratio(ratios(rounds, theirs, "bare", "call")),
            _ratio(ratios(rounds, ours, theirs, "call")),
            promised,
            f"{memory:.2f}",
            f"{other:.2f} (x {memory / other:.2f})",
        )
    return table


def _two_ranks() -> Table:
    timed, moved = run_ranks(measured, 2, 4 * ROUNDS, timeout=300)[0]
    table = Table("MegatronL2NormHook", "layer with hook, ms", "x bare layer", "promised",
                  "bytes received per call", title="two ranks, tensor parallel")  # fmt: skip
    table.add_row("(bare layer)", _ms(times(timed, "bare", "call")))
    for library in LIBRARIES:
        table.add_row(
            library,
            _ms(times(timed, library, "call")),
            _ratio(ratios(timed, library, "bare", "call")),
            f"<= {OVER_BARE}, 0 bytes" if library == OURS else "",
            f"{moved[library]:,}",
        )
    return table


def _ms(figure: Figure) -> str:
    low, high = figure.quartiles
    return f"{figure.median * 1e3:.2f} ± {(high - low) / 2 * 1e3:.2f}"


def _ratio(figure: Figure) -> str:
    low, high = figure.quartiles
    return f"{figure.median:.2f} ± {(high - low) / 2:.2f}"


if __name__ == "__main__":
    main()
