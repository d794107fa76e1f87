"""A sign of life: about once a second, from a thread of its own, until the process ends."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

__all__ = ["Beat"]

_SECONDS = 1.0
_DEPTH = 24
# Where a thread stands that waits for other ranks: in a collective, or in a backward full of them.
_WAITING = (
    ("distributed_c10d.py", ""),
    ("_functional_collectives.py", ""),
    ("graph.py", "_engine_run_backward"),
    ("p2p_communication.py", ""),  # megatron's pipeline schedules
)
# Of a second: a process that uses more computes there, and does not wait.
_IDLE = 0.1


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
        if self._thread is not threading.current_thread():  # whose garbage this may have been
            self._thread.join(2 * _SECONDS)
        return was_beating

    def _run(self) -> None:
        count, used = 0, time.process_time()
        while not self._ended.wait(_SECONDS):
            count, before, used = count + 1, used, time.process_time()
            idle = used - before < _IDLE * _SECONDS
            stands_in = _blocked_in(sys._current_frames().get(self._watched)) if idle else ""
            try:
                self._say(beat=count, blocked=stands_in)
                self.alarmed = self._alarm()
            except RuntimeError:
                return  # the store has gone, and with it everyone who could read


def _blocked_in(frame: FrameType | None) -> str:
    """The call into torch.distributed that a thread stands in, and who made it."""
    if frame is not None and _waits_itself(frame.f_code.co_filename):
        return _called(frame)
    for _ in range(_DEPTH):
        if frame is None:
            break
        code = frame.f_code
        for file, function in _WAITING:
            if code.co_filename.endswith(file) and function in code.co_name:
                return _called(frame)
        frame = frame.f_back
    return ""


def _waits_itself(file: str) -> bool:
    """Whether code there waits for ranks (a pipeline's schedule does) when it does not compute."""
    return "/torch/distributed/" in file and "/checkpoint/" not in file


def _called(frame: FrameType) -> str:
    name = frame.f_code.co_name
    outer: FrameType | None = frame
    while outer is not None and "/torch/" in outer.f_code.co_filename:
        outer = outer.f_back
    if outer is None:
        return name
    return f"{name} (from {outer.f_code.co_filename}:{outer.f_lineno})"
