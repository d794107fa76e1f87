"""Reading what the other ranks post, for a reason why a wait will never end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flex_model.distributed.board import Board, Fault, Post, Wait
from flex_model.distributed.process import space, state_of

__all__ = ["Look", "difference"]

# Seconds that a thing must last to count: what a rank said last may be a second old, a process
# may have ended with its part done, and a whole job may be stopped and go on.
_SETTLED = 1.0
_DETACHED = _CIRCLE = 2.5
_PASSED, _BLOCKED = 0.3, 1.5
_STOPPED = 6.0
# Without a sign of life from a process that cannot be looked at: long, for a rank whose editing
# function holds the interpreter gives none either. A broken connection makes it likely.
_SILENT, _SILENT_AND_BROKEN = 30.0, 3.5
# Between two looks at every rank's post, so that a thousand ranks do not swamp their store.
_PAUSE, _PAUSE_IN_FAILING = 0.5, 0.1
_RANKS_A_SECOND = 64


class Look:
    """One wait's looks at the other ranks: what must last to count is remembered between them.

    Args:
        board: where ranks post.
        rank: the rank that waits.
        ranks: all that the model is spread over.
        stage: of them those that run the same hooks.
        patience: seconds that a peer may stand in another collective before it counts as stuck.
    """

    def __init__(
        self,
        board: Board,
        rank: int,
        ranks: Sequence[int],
        stage: Sequence[int],
        patience: float,
    ) -> None:
        self._board = board
        self._rank = rank
        self._others = tuple(r for r in ranks if r != rank)
        self._stage = frozenset(stage)
        self._patience = patience
        self._space = space()
        self._pause = max(_PAUSE, len(ranks) / _RANKS_A_SECOND)
        self._looked = -math.inf
        self._since: dict[object, float] = {}

    def in_vain(self, own: Post, broken: bool = False) -> Fault | None:
        """Why this rank need not go on waiting; None if what it waits for may still come about.

        Args:
            own: what this rank posted, with the collective it waits in if that is one of ours.
            broken: whether a connection broke, so that some rank must have gone.
        """
        told = self._board.faults(self._others)
        if told:
            # Of several, the one that did not just pass another's on.
            return min(told, key=lambda fault: (fault.rank != fault.told_by, fault.rank))
        now = time.monotonic()
        if now - self._looked < self._pause:
            return None
        if now - self._looked > 2.0 + self._pause:
            self._since.clear()  # this very rank stood still: the others may have gone on
        self._looked = now
        posts = self._board.posts(self._others)
        return self._parted(own, posts) or self._gone(posts.values(), broken)

    def past(self, own: Post) -> bool:
        """Whether another rank can no longer fail as this one just did: it is further on, or gone.

        One that is busy may still come by.
        """
        now = time.monotonic()
        if now - self._looked < _PAUSE_IN_FAILING:
            return False
        self._looked = now
        posts = self._board.posts(self._others)
        return (
            bool(self._board.faults(self._others))
            or any(self._waits_for(own, post) for post in posts.values())
            or self._gone(posts.values(), broken=True) is not None
        )

    def _waits_for(self, own: Post, peer: Post) -> bool:
        """Whether a rank waits where this one would yet have to come."""
        here = {own.rank: own}
        if own.rank in _missing(peer, here) and self._lasts((peer.rank, peer.wait), _PASSED):
            return True
        return bool(peer.blocked) and self._lasts((peer.rank, peer.blocked), _BLOCKED)

    # -- ranks that are no more ------------------------------------------------------------

    def _gone(self, posts: Iterable[Post], broken: bool) -> Fault | None:
        for post in posts:
            how = self._farewell(post, broken) if post.left else self._silence(post, broken)
            if how is not None:
                cause = f"its process (id {post.pid} on {post.host}) {how}."
                return Fault(post.rank, f"forward {_last_step(post)}", cause)
        return None

    def _farewell(self, post: Post, broken: bool) -> str | None:
        """Whoever has done its part may go, but not with a connection that is still in use."""
        gone = broken and self._lasts((post.rank, "left"), _SETTLED)
        return "has come to the end of its program" if gone else None

    def _silence(self, post: Post, broken: bool) -> str | None:
        """How a process shows that nothing more is to be expected of it."""
        rank = post.rank
        if post.space and post.space == self._space:
            state = state_of(post.pid)
            if state == "ended" and self._lasts((rank, state), _SETTLED):
                return "was killed"
            if state == "stopped" and self._lasts((rank, state, post.beat), _STOPPED):
                return "is stopped"
            return None
        limit = _SILENT_AND_BROKEN if broken else _SILENT
        return "was killed, or stands still" if self._lasts((rank, post.beat), limit) else None

    # -- ranks that go another way ---------------------------------------------------------

    def _parted(self, own: Post, posts: dict[int, Post]) -> Fault | None:
        """Another rank's going elsewhere than to the collective that this one waits in."""
        wait = own.wait
        if wait is None:
            return None
        for rank in wait.members:
            cause = self._elsewhere(own, wait, posts[rank]) if rank != own.rank else None
            if cause is not None:
                return Fault(own.rank, wait.where, cause, disagreement=True)
        circle = self._circle(own, {**posts, own.rank: own})
        return Fault(own.rank, wait.where, circle, disagreement=True) if circle else None

    def _elsewhere(self, own: Post, wait: Wait, peer: Post) -> str | None:
        """How a peer has come to stand anywhere but in this rank's collective."""
        if _in_its_place(wait, peer):
            return f"rank {peer.rank} is at {peer.wait.where} in its place. {_SAME_WAY}"  # type: ignore[union-attr]
        if peer.entered.get(wait.group, 0) >= wait.number:
            return None  # it has come, and done its part or is about to
        step = _last_step(own)
        here, there = own.runs_at(step), peer.runs_at(step)
        differ = peer.rank in self._stage and here and there and here != there
        if differ and self._lasts((peer.rank, there), _SETTLED):
            named = difference(self._board, {own.rank: str(here), peer.rank: str(there)})
            return f"ranks run different hooks in forward {step}: {named}."
        return self._away(peer)

    def _away(self, peer: Post) -> str | None:
        """How a peer that has not come shows that it will not."""
        if peer.left and self._lasts((peer.rank, "left"), _SETTLED):
            return f"rank {peer.rank} has ended its program, or dropped its FlexModel. {_SAME_WAY}"
        if not peer.attached and self._lasts((peer.rank, "detached"), _DETACHED):
            return f"rank {peer.rank} has restored its model. Restore on every rank, or on none."
        stuck = peer.blocked and not peer.wait
        if stuck and self._lasts((peer.rank, peer.blocked), self._patience):
            return (
                f"rank {peer.rank} has stood for {self._patience:g} s in {peer.blocked}, which is "
                f"none of FlexModel's. {_SAME_WAY}"
            )
        return None

    def _circle(self, own: Post, posts: Mapping[int, Post]) -> str | None:
        """Ranks that wait for one another, each in another collective, if that lasts."""
        path = _circle_through(own, posts)
        if not path or not self._lasts(tuple((post.rank, post.wait) for post in path), _CIRCLE):
            return None
        standing = ", ".join(f"rank {post.rank} at {post.wait.where}" for post in path if post.wait)
        return f"ranks wait for one another: {standing}. {_SAME_WAY}"

    def _lasts(self, what: object, seconds: float) -> bool:
        """Whether this has been so at every look for so long."""
        now = time.monotonic()
        return now - self._since.setdefault(what, now) >= seconds


_SAME_WAY = "Every rank must call the model, its modules and its losses alike."


def difference(board: Board, what: Mapping[int, str]) -> str:
    """Which hooks one rank runs and another does not, of the words that they posted."""
    lines = {rank: board.description(word) for rank, word in what.items()}
    common = set.intersection(*map(set, lines.values())) if lines else set()
    parts, differs = [], False
    for rank, own in lines.items():
        extra = [line for line in own if line not in common]
        shown = ", ".join(extra[:4]) + (f" and {len(extra) - 4} more" if len(extra) > 4 else "")
        parts.append(f"rank {rank}: {shown or 'none besides the common ones'}")
        differs = differs or bool(extra)
    if differs:
        return "; ".join(parts)
    orders = list(zip(*lines.values(), strict=False))
    at = next((i for i, here in enumerate(orders) if len(set(here)) > 1), None)
    if at is None:
        return ", ".join(f"rank {rank}: {word}" for rank, word in what.items())
    told = ", ".join(f"{line} on rank {rank}" for rank, line in zip(lines, orders[at], strict=True))
    return f"in another order, number {at} being {told}"


def _in_its_place(wait: Wait, peer: Post) -> bool:
    """Whether a peer meets this rank in a collective that is for something else."""
    other = peer.wait
    same = other is not None and (wait.group, wait.number) == (other.group, other.number)
    return same and other is not None and wait.where != other.where


def _last_step(post: Post) -> int:
    return post.steps[-1][1] if post.steps else -1


def _missing(post: Post, posts: Mapping[int, Post]) -> Iterator[int]:
    """Of some ranks, those that have not entered the collective that a post waits in."""
    if post.wait is None:
        return
    for rank in post.wait.members:
        if rank in posts and posts[rank].entered.get(post.wait.group, 0) < post.wait.number:
            yield rank


def _circle_through(own: Post, posts: Mapping[int, Post]) -> list[Post]:
    """A chain of waiting ranks, each missing from the collective before it, back to ``own``."""
    paths = [[own]]
    seen = {own.rank}
    while paths:
        path = paths.pop()
        for rank in _missing(path[-1], posts):
            if rank == own.rank and len(path) > 1:
                return path
            if rank not in seen:
                seen.add(rank)
                paths.append([*path, posts[rank]])
    return []
