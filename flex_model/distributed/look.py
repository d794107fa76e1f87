"""Reading what the other ranks post, for a reason why a wait will never end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flex_model.distributed.board import Board, Fault, Post, Wait

__all__ = ["Look", "difference"]

# A post is news for a second, and its writer may be late on a busy machine.
STALE_SECONDS = 3.5
_SETTLED_SECONDS = 2.5


class Look:
    """One wait's looks at the other ranks: what must last to count is remembered between them.

    Args:
        board: where ranks post.
        rank: the rank that waits.
        ranks: all that the model is spread over.
        patience: seconds that a peer may stand in another collective before it counts as stuck.
    """

    def __init__(self, board: Board, rank: int, ranks: Sequence[int], patience: float) -> None:
        self._board = board
        self._rank = rank
        self._ranks = ranks
        self._patience = patience
        self._since: dict[object, float] = {}

    def in_vain(self, own: Post) -> Fault | None:
        """Why the collective that ``own`` waits in will never come about; None if it still may."""
        if own.wait is None:
            return None
        fault = self.gone(own.wait.members)
        if fault is not None:
            return fault
        posts = self._board.posts(own.wait.members)
        for peer in posts.values():
            cause = self._parted(own, peer) if peer.rank != self._rank else None
            if cause is not None:
                return Fault(self._rank, own.wait.where, cause, disagreement=True)
        circle = self._circle(own, own.wait, posts)
        return Fault(self._rank, own.wait.where, circle, disagreement=True) if circle else None

    def gone(self, ranks: Iterable[int]) -> Fault | None:
        """A fault that one of these ranks told, or one whose process gives no sign of life."""
        ranks = tuple(ranks)
        told = self._board.faults(rank for rank in ranks if rank != self._rank)
        if told:
            # Of several, the one that did not just pass another's on.
            return min(told, key=lambda fault: (fault.rank != fault.told_by, fault.rank))
        for rank, post in self._board.posts(ranks).items():
            if rank != self._rank and self._lasts((rank, post.beat), STALE_SECONDS):
                how = "has ended" if post.left else "was killed, or stands still"
                cause = f"its process (id {post.pid} on {post.host}) {how}."
                return Fault(rank, f"forward {_last_step(post)}", cause)
        return None

    def _parted(self, own: Post, peer: Post) -> str | None:
        """How a peer has parted from this rank's way."""
        wait, step = own.wait, _last_step(own)
        here, there = own.runs_at(step), peer.runs_at(step)
        if here is not None and there is not None and here != there:
            named = difference(self._board, {own.rank: here, peer.rank: there})
            return f"ranks run different hooks in forward {step}: {named}"
        same = (
            wait and peer.wait and (wait.group, wait.number) == (peer.wait.group, peer.wait.number)
        )
        if wait and peer.wait and same and wait.where != peer.wait.where:
            return f"rank {peer.rank} is at {peer.wait.where} in its place. {_SAME_WAY}"
        if not peer.attached and self._lasts((peer.rank, "detached"), _SETTLED_SECONDS):
            return f"rank {peer.rank} has restored its model. Restore on every rank, or on none."
        if peer.left and self._lasts((peer.rank, "left"), 1.0):
            return f"rank {peer.rank} has ended its program. {_SAME_WAY}"
        if (
            peer.blocked
            and not peer.wait
            and self._lasts((peer.rank, peer.blocked), self._patience)
        ):
            return (
                f"rank {peer.rank} has stood for {self._patience:g} s in {peer.blocked}, which is "
                f"none of FlexModel's. {_SAME_WAY}"
            )
        return None

    def _circle(self, own: Post, wait: Wait, posts: Mapping[int, Post]) -> str | None:
        """Ranks that wait for one another, each in another collective, if that lasts."""
        path = _circle_through(own, wait, {**posts, own.rank: own}, self._board)
        if not path or not self._lasts(tuple(path), _SETTLED_SECONDS):
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
    return ", ".join(f"rank {rank}: {word}" for rank, word in what.items()) + " (in another order)"


def _in_its_place(wait: Wait, other: Wait) -> bool:
    """Whether another rank would meet this one in a collective that is for something else."""
    same = (wait.group, wait.number) == (other.group, other.number)
    return same and wait.where != other.where


def _last_step(post: Post) -> int:
    return post.steps[-1][1] if post.steps else -1


def _missing(post: Post, posts: Mapping[int, Post]) -> Iterator[int]:
    """The ranks that have not entered the collective that a post waits in."""
    if post.wait is None:
        return
    for rank in post.wait.members:
        if rank != post.rank and posts[rank].entered.get(post.wait.group, 0) < post.wait.number:
            yield rank


def _circle_through(own: Post, wait: Wait, posts: dict[int, Post], board: Board) -> list[Post]:
    """A chain of waiting ranks, each missing from the collective before it, back to ``own``."""
    paths = [[own]]
    seen = {own.rank}
    while paths:
        path = paths.pop()
        here = path[-1]
        if here.wait is None:
            continue
        unread = [rank for rank in here.wait.members if rank not in posts]
        posts.update(board.posts(unread))
        for rank in _missing(here, posts):
            if rank == own.rank:
                return path
            if rank not in seen:
                seen.add(rank)
                paths.append([*path, posts[rank]])
    return []
