"""The measurements as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from figures import Figure, differences, ratios, times
from hooks.measure import Measured
from hooks.per_hook import agreement, per_hook
from hooks.settings import ONE_PROCESS, TWO_RANKS, VERSION
from hooks.targets import Target

__all__ = ["one_process_table", "targets_table", "times_table", "traffic_table"]

_MILLI, _MICRO = 1e3, 1e6
_COLOURS = {"met": "green", "open": "yellow", "missed": "red"}


@dataclass(frozen=True)
class _Row:
    """One way of doing one job.

    Attributes:
        job: "no hooks", "idle", "retrieve" or "edit".
        by: who does it.
        measured: the library's measurements; plain torch is shown as timed beside this library.
        way: its name there.
        plain: the name of plain torch doing the same job, in the same rounds.
    """

    job: str
    by: str
    measured: Measured
    way: str
    plain: str


def one_process_table(phase: str, title: str, ours: Measured, original: Measured) -> Table:
    """Times on one process, of "forward" or "step"."""
    columns = ("ms", "/ no hooks", "/ torch", "us per hook")
    title = f"{ONE_PROCESS}, {title}, {len(ours.rounds)} rounds"
    table = _table(title, "", "by", *columns)
    plain = {"no hooks": "bare", "idle": "bare", "retrieve": "raw retrieve", "edit": "raw edit"}
    for row in _rows(table, plain, ours, original):
        rounds, cells = row.measured.rounds, ["", "", ""]
        if row.way != "bare":
            cells[0] = _shown(ratios(rounds, row.way, "bare", phase), 1, 3)
        if row.way not in ("bare", row.plain) and row.plain != "bare":
            cells[1] = _shown(ratios(rounds, row.way, row.plain, phase), 1, 3)
        if row.plain != "bare":
            extra = differences(rounds, row.way, "bare", phase)
            cells[2] = _shown(extra, _MICRO / len(ONE_PROCESS.hooked), 1)
        table.add_row(row.job, row.by, _shown(times(rounds, row.way, phase), _MILLI, 2), *cells)
    other = _shown(times(original.rounds, "bare", phase), _MILLI, 2)
    table.caption = f"{VERSION} is held to its own process, where no hooks took {other} ms."
    return table


def times_table(ours: Measured, original: Measured) -> Table:
    """Times over ranks: of the hooked modules, and of what comes before a forward."""
    columns = ("forward, us", "/ torch", "backward, us", "/ torch", "start, us")
    title = f"{TWO_RANKS}, time per hook, {len(ours.rounds)} rounds"
    table = _table(title, "", "by", *columns)
    for row in _rows(table, _BY_HAND, ours, original):
        rounds, cells = row.measured.rounds, []
        for phase in "forward", "backward":
            extra = differences(rounds, row.way, "bare", phase)
            against = _shown(ratios(rounds, row.way, row.plain, phase), 1, 2)
            cells.append(_shown(extra, _MICRO / len(TWO_RANKS.hooked), 0))
            cells.append("" if row.way == row.plain else against)
        start = differences(row.measured.beginnings, row.way, "bare", "beginning")
        table.add_row(row.job, row.by, *cells, _shown(start, _MICRO, 0))
    table.caption = (
        "Beyond the same modules without hooks, called one after the other; ratios are of modules "
        "with their hooks. Start: once per forward, before its first module."
    )
    return table


def traffic_table(ours: Measured, original: Measured) -> Table:
    """Collectives and bytes over ranks."""
    columns = ("forward, per hook", "backward, per hook", "agreement")
    table = _table(f"{TWO_RANKS}, traffic of a step", "", "by", *columns)
    for row in _rows(table, _BY_HAND, ours, original):
        halves = (per_hook(row.measured, row.way, half) for half in ("forward", "backward"))
        table.add_row(row.job, row.by, *map(str, halves), agreement(row.measured, row.way))
    table.caption = (
        "Of the whole model; bytes that reach a rank from another, over all ranks; agreement: all "
        "exchanges of the step. An edit of slices whose backward exchanges nothing loses gradients."
    )
    return table


def targets_table(reached: Sequence[Target]) -> Table:
    """What is to be reached, and whether it is."""
    table = _table("Targets", "", "due", "measured", "")
    for target in reached:
        colour = _COLOURS[target.verdict]
        table.add_row(target.what, target.due, target.measured, f"[{colour}]{target.verdict}")
    table.caption = (
        "In brackets, where the true median is to be expected (95 %); open: it may be what is due."
    )
    return table


_BY_HAND = {"retrieve": "gather by hand", "edit": "edit by hand"}


def _rows(
    table: Table, plain: Mapping[str, str], ours: Measured, original: Measured
) -> Iterator[_Row]:
    """Each job by plain torch, if it can, and by both libraries; a section of the table each."""
    for job, held_to in plain.items():
        if job != "idle":
            yield _Row(job, "torch", ours, held_to, held_to)
        if job != "no hooks":
            yield _Row(job, "FlexModel", ours, job, held_to)
            yield _Row(job, VERSION, original, job, held_to)
            table.add_section()


def _shown(figure: Figure, unit: float, digits: int) -> str:
    """The median, and half the distance between the quartiles."""
    low, high = figure.quartiles
    return f"{figure.median * unit:.{digits}f} ±{(high - low) / 2 * unit:.{digits}f}"


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="left" if column == "by" else "right")
    return table
