"""What the grid's measurements at one hook point come to, in one word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from flex_model.testing.compare import Measurement

__all__ = ["State", "Verdict", "judged", "verdict_table"]


class State(Enum):
    """The words, the mildest first."""

    EXACT = "EXACT"
    DEGRADED = "DEGRADED"
    UNCHECKED = "UNCHECKED"
    WRONG = "WRONG"

    @property
    def fails(self) -> bool:
        """Whether a check that found it has failed: what was to be compared was not, or differs."""
        return self in (State.UNCHECKED, State.WRONG)


_COLORS = {State.EXACT: "green", State.DEGRADED: "yellow"}


@dataclass(frozen=True)
class Verdict:
    """What was found at one hook point.

    Attributes:
        site: the hook point.
        state: the word for it.
        error: the largest relative error measured; None if nothing was.
        notes: what is degraded or wrong.
    """

    site: str
    state: State
    error: float | None = None
    notes: tuple[str, ...] = ()


def judged(
    site: str, measured: Sequence[Measurement], degraded: Sequence[str], wrong: Sequence[str]
) -> Verdict:
    """The verdict of one hook point.

    Args:
        site: the hook point.
        measured: every rank's numbers.
        degraded: what does not work there, and says so.
        wrong: what went wrong without a number.
    """
    error = max((m.error for m in measured), default=None)
    off = [_told(name, [m for m in measured if m.quantity == name]) for name in _failed(measured)]
    if off or wrong:
        return Verdict(site, State.WRONG, error, (*wrong, *off, *degraded))
    state = State.DEGRADED if degraded else State.EXACT
    return Verdict(site, state, error, tuple(degraded))


def _failed(measured: Sequence[Measurement]) -> list[str]:
    return list(dict.fromkeys(m.quantity for m in measured if not m.passes))


def _told(quantity: str, measured: Sequence[Measurement]) -> str:
    """How far a quantity is off, and with which kinds of hooks."""
    # The grid counts some quantities of the edit apart, in columns of their own names.
    kinds = dict.fromkeys(
        "edit" if m.column == quantity else m.column for m in measured if not m.passes
    )
    worst = max(m.error for m in measured)
    return f"{quantity} off by {worst:.1e} ({', '.join(kinds)})"


def verdict_table(title: str, verdicts: Sequence[Verdict]) -> Table:
    """One row per hook point."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("hook", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    table.add_column("largest error", justify="right", no_wrap=True)
    table.add_column("what", overflow="fold")
    for verdict in verdicts:
        error = "-" if verdict.error is None else f"{verdict.error:.1e}"
        word = Text(verdict.state.value, style=_COLORS.get(verdict.state, "red"))
        table.add_row(Text(verdict.site), word, error, Text("\n".join(verdict.notes)))
    return table
