"""What each rank posts for the others, out of band: no collective, no rank waits for another.

The board is a namespace in a key-value store: the job's own (under torchrun the agent's, which no
rank can take down by dying), or any other that the caller hands in. A rank overwrites its own post,
so the store does not grow; faults are kept, one per rank, behind a counter that tells cheaply
whether there are any.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.distributed import PrefixStore, Store

from flex_model.distributed.process import space

__all__ = ["Board", "Fault", "Post", "Wait"]

_FAULTS = "faults"


@dataclass(frozen=True)
class Wait:
    """A collective of ours that a rank waits in.

    Attributes:
        group: the process group's name, the same on all its members.
        members: their global ranks.
        number: how many of our collectives this rank has entered on that group.
        where: hook point, or what else the collective is for.
    """

    group: str
    members: tuple[int, ...]
    number: int
    where: str


@dataclass(frozen=True)
class Post:
    """What a rank last said of itself.

    Attributes:
        rank: global rank.
        beat: counts up about once a second for as long as the process lives.
        steps: forwards begun, as runs of equal ones: ``(first step, last step, what it runs)``.
        wait: the collective it waits in; None if it does not.
        entered: our collectives entered so far, by group name.
        blocked: the torch.distributed call that its main thread stands in, if it does.
        attached: whether its hooks are on the model.
        left: whether the process has ended its part in good order.
        pid: process id.
        host: host name.
        space: which processes can look at this one; see `process.space`.
    """

    rank: int
    beat: int = 0
    steps: tuple[tuple[int, int, str], ...] = ()
    wait: Wait | None = None
    entered: dict[str, int] = field(default_factory=dict)
    blocked: str = ""
    attached: bool = True
    left: bool = False
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    space: str = field(default_factory=space)

    def runs_at(self, step: int) -> str | None:
        """What this rank ran in a forward; None if it has not come to it, or long ago."""
        return next((what for first, last, what in self.steps if first <= step <= last), None)


@dataclass(frozen=True)
class Fault:
    """Why a rank can go on no longer.

    Attributes:
        rank: the rank that failed, or that found out.
        where: module and hook kind, or what else it was about.
        cause: what happened there.
        disagreement: whether the ranks run different things; else one of them failed.
        told_by: the rank that posted it, which may have stopped only because the other did.
    """

    rank: int
    where: str
    cause: str
    disagreement: bool = False
    told_by: int = -1

    def __str__(self) -> str:
        return f"rank {self.rank} at {self.where}: {self.cause}"


class Board:
    """One FlexModel's part of a store.

    Args:
        store: any torch store that all ranks reach.
        name: of this FlexModel; the same on its ranks and on no other's.

    Attributes:
        store: which one.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self._store = PrefixStore(name, store)

    def put(self, post: Post) -> None:
        """Say something of oneself: about twenty microseconds, no reply is waited for."""
        told = {**vars(post), "wait": post.wait and vars(post.wait)}
        self._store.set(f"rank/{post.rank}", json.dumps(told))

    def has_all(self, ranks: Iterable[int]) -> bool:
        """Whether all of these ranks have said something."""
        return bool(self._store.check([f"rank/{rank}" for rank in ranks]))

    def posts(self, ranks: Iterable[int]) -> dict[int, Post]:
        """What these ranks last said, with one question to the store."""
        ranks = tuple(ranks)
        told = self._store.multi_get([f"rank/{rank}" for rank in ranks]) if ranks else ()
        return dict(zip(ranks, map(_post, told), strict=True))

    def describe(self, what: str, lines: Iterable[str]) -> None:
        """Post what a forward runs, line by line, under the word that stands for it."""
        key = f"what/{what}"
        self._store.set(key, "\n".join(lines))
        self._store.check([key])  # answered after the set: whoever hears of the word finds them

    def description(self, what: str) -> list[str]:
        """The lines behind a word; none if nobody posted them."""
        key = f"what/{what}"
        text = self._store.get(key).decode() if self._store.check([key]) else ""
        return text.splitlines()

    def report(self, fault: Fault) -> None:
        """Post a fault. A rank's first one stands."""
        key = f"fault/{fault.told_by}"
        if not self._store.check([key]):
            self._store.set(key, json.dumps(asdict(fault)))
            self._store.add(_FAULTS, 1)

    def count(self, event: str) -> int:
        """Count an event that happened on this rank; how many ranks it has happened on so far."""
        return self._store.add(f"count/{event}", 1)

    def counted(self, event: str) -> int:
        """How many ranks an event has happened on so far."""
        return self._store.add(f"count/{event}", 0)

    def any_fault(self) -> bool:
        """Whether a fault stands: one question to the store."""
        return self._store.add(_FAULTS, 0) > 0

    def faults(self, ranks: Iterable[int]) -> list[Fault]:
        """The faults that these ranks posted."""
        if not self.any_fault():
            return []
        keys = {rank: f"fault/{rank}" for rank in ranks}
        return [
            Fault(**json.loads(self._store.get(key)))
            for key in keys.values()
            if self._store.check([key])
        ]


def _post(text: bytes) -> Post:
    told: dict[str, Any] = json.loads(text)
    if told["wait"]:
        told["wait"] = Wait(**{**told["wait"], "members": tuple(told["wait"]["members"])})
    told["steps"] = tuple(tuple(run) for run in told["steps"])
    return Post(**told)
