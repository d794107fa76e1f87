"""One step's traffic of what editing functions store: down the line, and at its end to everybody.

Several microbatches are on their way at once, so a backward hook finds what was stored in the
forward of its own microbatch, not in the last one. What it stores itself goes to the other stages
when the step ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flex_model.core.stored import (
    MISSING,
    Changes,
    Path,
    Stored,
    combined,
    guarded,
    packed,
    paths,
    spelled,
    travelling,
)
from flex_model.distributed.line import Line
from flex_model.errors import EditError

__all__ = ["StoredInStep"]


class StoredInStep:
    """The stored values of one stage, step by step.

    Args:
        line: this rank's counterparts on the other stages.
        stored: the namespace's changes.
    """

    def __init__(self, line: Line, stored: Stored) -> None:
        self._line = line
        self._stored = stored
        self.begin()

    def begin(self) -> None:
        """A step begins: what is there now is on every stage alike."""
        self._began = self._before = self._stored.look()
        self._read: set[str] = set()  # names that were read here as no stage before left them
        self._forward: set[Path] = set()  # what was replaced here, in forwards
        self._backward: set[Path] = set()  # and between them
        self._late: Changes = {}  # what was stored here between forwards
        self._received: Changes = {}
        self._of_forward: dict[int, dict[Path, Any]] = {}  # what each one's forward replaced
        self._aside: dict[Path, Any] = {}  # meanwhile, in the backward of another microbatch
        self._microbatch = -1

    def begin_microbatch(self) -> None:
        """Take over what the stage before has handed on."""
        self._end_backward()
        self._microbatch += 1
        self._before = self._stored.look()
        if self._line.stage > 0:
            self._received = guarded(self._line.receive(self._line.stage - 1, "save_ctx"))
            self._stored.take(self._received)
            self._stored.look()

    def end_microbatch(self) -> int:
        """Hand on what has changed in this microbatch, on this stage or before it; its number.

        Raises:
            EditError: it cannot pass between stages.
        """
        own, changes = self._stored.changes(), self._stored.changes(self._before)
        self._forward |= paths(own)
        self._read |= self._stored.read - self._received.keys()
        if self._line.stage < self._line.stages - 1:
            self._line.send(self._line.stage + 1, travelling(changes, told=True))
        self._of_forward[self._microbatch] = {p: self._stored.at(p) for p in paths(changes)}
        self._stored.look()
        return self._microbatch

    def begin_backward(self, microbatch: int) -> None:
        """Have the values back that a microbatch's forward left."""
        if microbatch not in self._of_forward:
            return  # begun already
        self._end_backward()
        for path, value in self._of_forward.pop(microbatch).items():
            self._aside[path] = self._stored.at(path)
            self._stored.put(path, value)
        self._stored.look()

    def end(self) -> None:
        """Leave the step, be it that it failed."""
        self._end_backward()
        self.begin()

    def _end_backward(self) -> None:
        changes = self._stored.changes()
        replaced = paths(changes)
        self._late = combined(self._late, changes)
        # Checkpointing stores once more what the forward did: that is no news.
        self._backward |= replaced - self._forward
        self._read |= self._stored.read
        for path, value in self._aside.items():
            if not any(path[: len(short)] == short for short in replaced):
                self._stored.put(path, value)
        self._aside = {}

    def share(self) -> None:
        """Have everything on every stage, as the last one has it.

        Raises:
            EditError: something cannot pass between stages, or a stage read what it did not have.
        """
        self._end_backward()
        own = {
            "late": travelling(self._late),
            "read": sorted(self._read),
            "forward": list(self._forward),
            "backward": list(self._backward),
        }
        told = self._line.exchange(own, "save_ctx")
        _check_read(told)
        late = [of_stage["late"] for of_stage in told[:-1]]
        self._stored.replace(self._values_of_last({name for changes in late for name in changes}))
        for changes in reversed(late):
            self._stored.take(changes)

    def _values_of_last(self, names: set[str]) -> dict[str, Any]:
        """What the last stage has by names that it changed, or that are given; else MISSING."""
        line, last, values = self._line, self._line.stages - 1, self._stored.values
        found = None
        if line.stage == last:
            names = {*names, *self._stored.changes(self._began)}
            held = {n: packed(values[n], f"save_ctx.{n}") for n in names & values.keys()}
            found = [held, sorted(names - values.keys())]
        held, gone = line.shared(found, last, "save_ctx")
        return {**held, **dict.fromkeys(gone, MISSING)}


def _check_read(told: Sequence[dict[str, Any]]) -> None:
    """Refuse that a stage went by what another had stored, or would have in one process."""
    for reader, own in enumerate(told):
        mine = {*own["forward"], *own["backward"]}
        for writer, other in enumerate(told):
            late = other["backward"] if writer != reader else ()
            for path in (*late, *(other["forward"] if writer > reader else ())):
                if path[0] in own["read"] and (len(path) == 1 or path in mine):
                    raise EditError(
                        f"{spelled(path)} is stored on pipeline stage {writer}, and read on stage "
                        f"{reader} before it gets there: in one process it would be, for "
                        "microbatches run one after the other. Read values on the stage that "
                        "stores them or, in forwards, behind it; collect over microbatches in "
                        "lists, or in names of each stage's own."
                    )
