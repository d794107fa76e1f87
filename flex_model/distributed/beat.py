"""A sign of life: about once a second, from a thread of its own, until the process ends."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType

import torch.distributed as dist

__all__ = ["Beat"]

_SECONDS = 1.0
_DEPTH = 24
# Where a thread stands that waits for other ranks: in a collective, or in a backward full of them.
_WAITING = (("distributed_c10d.py", ""), ("graph.py", "_engine_run_backward"))


class Beat:
    """Posts that this process lives and what its main thread stands in; listens for alarms.

    Args:
        say: takes ``beat`` (a count) and ``blocked`` (a torch.distributed call, or nothing).
        alarm: asks whether any rank has posted a fault.
    """

    def __init__(self, say: Callable[..., None], alarm: Callable[[], bool]) -> None:
        self.alarmed = False
        self._say = say
        self._alarm = alarm
        self._watched = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="flex_model beat")
        self._thread.start()

    def end(self) -> bool:
        """Stop; whether it was still beating."""
        was_beating = not self._ended.is_set()
        self._ended.set()
        self._thread.join(2 * _SECONDS)
        return was_beating

    def _run(self) -> None:
        count = 0
        while not self._ended.wait(_SECONDS):
            count += 1
            try:
                self._say(beat=count, blocked=_blocked_in(sys._current_frames().get(self._watched)))
                self.alarmed = self._alarm()
            except (dist.DistError, RuntimeError):
                return  # the store has gone, and with it everyone who could read


def _blocked_in(frame: FrameType | None) -> str:
    """The call into torch.distributed that a thread stands in, and who made it."""
    for _ in range(_DEPTH):
        if frame is None:
            break
        code = frame.f_code
        for file, function in _WAITING:
            if code.co_filename.endswith(file) and function in code.co_name:
                return _called(frame)
        frame = frame.f_back
    return ""


def _called(frame: FrameType) -> str:
    name = frame.f_code.co_name
    outer: FrameType | None = frame
    while outer is not None and "/torch/" in outer.f_code.co_filename:
        outer = outer.f_back
    if outer is None:
        return name
    return f"{name} (from {outer.f_code.co_filename}:{outer.f_lineno})"
