"""When a checkpoint is due: every so many batches, or after so much time."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import timedelta

from flex_model.errors import ImportanceError

__all__ = ["Every"]

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Every:
    """One of the two.

    Attributes:
        batches: counted from the run's very first.
        seconds: since the last checkpoint, or the start.
    """

    batches: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, given: int | str | timedelta) -> Every:
        """Read a number of batches (``10``), a time (``"90s"``, ``"10m"``, ``"2h"``), or a
        ``timedelta``.

        Raises:
            ImportanceError: it is none, or not positive.
        """
        found = cls()
        if isinstance(given, timedelta):
            found = cls(seconds=given.total_seconds())
        elif isinstance(given, int) and not isinstance(given, bool):
            found = cls(batches=given)
        elif isinstance(given, str):
            found = _read(given.strip())
        if (found.batches or found.seconds or 0) <= 0:
            raise ImportanceError(
                f"every={given!r} is no interval. Give a number of batches, or a time such as "
                '"90s", "10m" or "2h", or a timedelta.'
            )
        return found

    def due(self, batches: int, since: float) -> bool:
        """Whether a checkpoint is due.

        Args:
            batches: done so far.
            since: ``time.monotonic()`` of the last checkpoint.
        """
        if self.batches is not None:
            return batches % self.batches == 0
        return time.monotonic() - since >= (self.seconds or 0.0)


def _read(text: str) -> Every:
    if text.isdigit():
        return Every(batches=int(text))
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    return Every(seconds=float(found[1]) * _SECONDS[found[2]]) if found else Every()
