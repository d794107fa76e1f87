"""Scores on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from flex_model.importance.results.summary import Row

__all__ = ["HEAD", "cells", "score_table"]

HEAD = ("module", "kind", "channels", "least", "median", "most", "top 10 %")


def score_table(rows: Sequence[Row]) -> Table:
    """A row for each hook; "top 10 %" is what the top tenth of the channels holds of the sum."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for number, name in enumerate(HEAD):
        table.add_column(name, justify="left" if number < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in cells(row)))
    return table


def cells(row: Row) -> tuple[str, ...]:
    """A row's texts, under `HEAD`."""
    scores, share = row.scores, row.share
    numbers = (scores.min(), scores.quantile(0.5), scores.max())
    return (
        row.module or "(the model)",
        row.kind,
        str(scores.numel()),
        *(f"{float(number):.4g}" for number in numbers),
        f"{100 * share:.0f} %" if share is not None else "-",
    )
