"""The ranks of one scoring run: what they tell each other, and how all fail if one does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flex_model.distributed.mesh import ParallelMesh
from flex_model.errors import ImportanceError

__all__ = ["Peers"]

Rows = dict[int, tuple[int, ...]]


class Peers:
    """The ranks that a model is spread over, on FlexModel's own CPU group.

    Args:
        mesh: the ranks. A single process has nobody to tell.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        self.mesh = mesh
        self.number = mesh.ranks.index(mesh.rank) if mesh.names else 0
        self.count = len(mesh.ranks) if mesh.control is not None else 1

    @property
    def first(self) -> bool:
        """Whether this is the model's first rank."""
        return self.number == 0

    def meet(self, what: str, attempt: Callable[[], Sequence[int]], width: int) -> Rows:
        """What every rank finds, in mesh order. Collective: one small all-gather.

        Args:
            what: is tried, for messages; the same on every rank.
            attempt: a rank's few integers.
            width: how many.

        Raises:
            ImportanceError: it raised on some rank; the same on every rank.
            RankFailedError: a rank will not come any more.
        """
        error: Exception | None = None
        own: Sequence[int] = [0] * width
        try:
            own = attempt()
        except Exception as raised:  # noqa: BLE001 - raised below, when the others know
            error = raised
        told = _spelled(error).encode() if error is not None else b""
        rows = self._exchange(what, [len(told), *own])
        longest = max(row[0] for row in rows.values())
        if longest:
            texts = self._exchange(what, list(told.ljust(longest, b"\0")))
            said = {rank: bytes(row).rstrip(b"\0").decode() for rank, row in texts.items()}
            raise ImportanceError(f"{what}: {_together(said)}") from error
        return {rank: row[1:] for rank, row in rows.items()}

    def agreed(self, what: str, step: Callable[[], None]) -> None:
        """Run a step on every rank; if it fails on one, all raise. Collective. See `meet`."""

        def attempt() -> Sequence[int]:
            step()
            return ()

        self.meet(what, attempt, 0)

    def _exchange(self, what: str, own: Sequence[int]) -> Rows:
        control, watch = self.mesh.control, self.mesh.watch
        if control is None:
            return {self.mesh.rank: tuple(own)}
        if watch is not None:
            watch.where = what
        return control.exchange(own)


def _spelled(error: Exception) -> str:
    if isinstance(error, ImportanceError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _together(said: dict[int, str]) -> str:
    """Each text once, with the ranks that said it where not all did."""
    texts = {text for text in said.values() if text}
    if len(texts) == 1 and all(said.values()):
        return texts.pop()
    return "; ".join(f"rank {rank}: {text}" for rank, text in said.items() if text)
