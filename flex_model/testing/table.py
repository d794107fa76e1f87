"""The parity grid as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from flex_model.testing.case import HARD_SITES
from flex_model.testing.compare import Measurement
from flex_model.testing.runs import COLUMNS

__all__ = ["grid_table", "markdown_table"]


def grid_table(rows: Mapping[str, Sequence[Measurement]]) -> Table:
    """One row per case, one column per kind of work, then one per hard site.

    A cell holds the largest relative error without a hint and, below it, with one; what does not
    pass is red.
    """
    table = Table(
        title="Largest relative error against one process: without a hint, below it with one",
        box=SIMPLE_HEAD,
    )
    table.add_column("row", no_wrap=True)
    for heading in (*COLUMNS, *HARD_SITES):
        longest = max(map(len, heading.split()))
        table.add_column(heading, justify="right", min_width=longest)
    for name, measured in rows.items():
        cells = [_cell([m for m in measured if m.column == column]) for column in COLUMNS]
        cells += [_cell([m for m in measured if m.hard == hard]) for hard in HARD_SITES]
        table.add_row(name, *cells)
    return table


def markdown_table(rows: Mapping[str, Sequence[Measurement]]) -> str:
    """The same for a page: of each cell the larger of the two numbers, bold if it does not pass."""
    headings = (*COLUMNS, *HARD_SITES)
    lines = [_line(("row", *headings)), _line(("---", *["---:"] * len(headings)))]
    for name, measured in rows.items():
        cells = [[m for m in measured if m.column == column] for column in COLUMNS]
        cells += [[m for m in measured if m.hard == hard] for hard in HARD_SITES]
        lines.append(_line((name, *map(_markdown_cell, cells))))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_cell(measured: Sequence[Measurement]) -> str:
    if not measured:
        return ""
    text = f"{max(m.error for m in measured):.0e}"
    return text if all(m.passes for m in measured) else f"**{text}**"


def _cell(measured: Sequence[Measurement]) -> str:
    lines = []
    for hint in (False, True):
        same = [m for m in measured if m.hint == hint]
        if same:
            text = f"{max(m.error for m in same):.0e}"
            lines.append(text if all(m.passes for m in same) else f"[red]{text}[/red]")
    return "\n".join(lines)
