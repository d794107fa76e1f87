"""How far a run is, on the terminal of the first rank."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Bar"]


class Bar:
    """Batches done of all, the time passed, and the time left.

    Args:
        hooks: how many there are.
        total: batches; None if nobody knows, and then no time left is shown.
        console: where it is shown; None for standard error, if that is a terminal.
        shown: False on all ranks but the first.
    """

    def __init__(
        self, hooks: int, total: int | None, console: Console | None, *, shown: bool
    ) -> None:
        console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("batches"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._progress.add_task(f"scoring by {hooks} hooks", total=total, note="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def advance(self) -> None:
        """One batch more is done."""
        self._progress.advance(self._task)

    def resumed(self, done: int) -> None:
        """So many were done before: they say nothing of the speed."""
        total = self._progress.tasks[0].total
        self._progress.reset(self._task, total=total, completed=done, note=f"resumed at {done}")

    def saved(self, done: int) -> None:
        """A checkpoint was written."""
        self._progress.update(self._task, note=f"saved at {done}")
