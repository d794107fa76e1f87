"""`scripts/bench rotations`: time of online R4, and perplexity of a rounded model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # for `rounding`

from figures import ratios, times
from flex_model.testing.ranks import run_ranks
from rotations import one_process, rounded, two_ranks
from timing import Round

ROUNDS = 9


def main() -> None:
    """Three tables."""
    torch.set_num_threads(1)
    console = Console()
    table = Table("features", "fast", "dense / fast", "butterflies / fast",
                  title=f"Online R4 of {one_process.TOKENS} tokens, one thread")  # fmt: skip
    for size in one_process.SIZES:
        timed = one_process.measured(size, ROUNDS)
        table.add_row(f"{size:,}", _time(timed, "fast"), *_over(timed, "fast", "dense"),
                      *_over(timed, "fast", "butterflies"))  # fmt: skip
    console.print(table)
    table = Table("features", "exchange", "gather / exchange",
                  title=f"The same over two ranks (gloo), {one_process.TOKENS} tokens")  # fmt: skip
    for size in one_process.SIZES:
        timed = run_ranks(two_ranks.measured, 2, size, 3 * ROUNDS)[0]
        table.add_row(f"{size:,}", _time(timed, "exchange"), *_over(timed, "exchange", "gather"))
    console.print(table)
    exact, found = rounded.measured()
    names = [f"W{w}" + (f" A{a}" if a else "") for w, a in rounded.BITS]
    table = Table("byte-level Llama", *names, title=f"Perplexity per byte; {exact:.3f} unrounded")
    for name, row in found.items():
        table.add_row(name, *row)
    console.print(table)


def _time(timed: Sequence[Round], way: str) -> str:
    return f"{1e3 * times(timed, way, 'call').median:.2f} ms"


def _over(timed: Sequence[Round], base: str, way: str) -> list[str]:
    if way not in timed[0]:
        return ["-"]
    figure = ratios(timed, way, base, "call")
    low, high = figure.interval
    return [f"{figure.median:.1f} ({low:.1f} to {high:.1f})"]


if __name__ == "__main__":
    main()
