"""Waiting for other ranks with open eyes: every wait is bounded, and its end is explained.

A collective that a peer will never join waits until its process group times out, half an hour
later, and then names a socket. So a rank that waits for more than a moment posts where it stands on
the `Board`, reads what its peers post, and raises as soon as one of them cannot come any more: it
failed, was killed, runs other hooks, took them off, or waits for this rank elsewhere.

On the CPU the waiting is done here, a slice at a time. A collective on an accelerator is left to
its stream and to its backend's own watchdog, for looking would stall the device; its ranks meet
once per forward on a CPU group, and there these eyes are open.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
import time
import traceback
import weakref
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist

from flex_model.distributed.beat import Beat
from flex_model.distributed.board import Board, Fault, Post, Wait
from flex_model.distributed.look import Look
from flex_model.errors import FlexModelError, RankDisagreementError, RankFailedError

__all__ = ["Waitable", "Watch"]

_SLICE = timedelta(milliseconds=200)
# How long ranks that are busy may be behind in failing alike, and how long after a connection
# broke it may take to show which rank has gone.
_ALIKE_SECONDS = 5.0
_BEHIND_SECONDS = 8.0
_MAX_RUNS = 16
_LONGEST_CAUSE = 2000
_ANSWER = "_flex_model_answer"


class Waitable(Protocol):
    """A collective under way, as `torch.distributed.Work` has it."""

    def wait(self, timeout: timedelta = ...) -> object: ...

    def is_completed(self) -> bool: ...


class Watch:
    """One rank's waiting, and what it tells the others meanwhile.

    Args:
        board: where ranks post.
        rank: this one.
        ranks: all that the model is spread over.
        stage: of them those that run the same hooks: this one's pipeline stage.
        patience: seconds that a peer may stand in another collective before it counts as stuck.

    Attributes:
        where: what this rank is at, for its posts and for messages; whoever begins a collective
            sets it.
    """

    def __init__(
        self,
        board: Board,
        rank: int,
        ranks: Sequence[int],
        stage: Sequence[int],
        patience: float,
    ) -> None:
        self.where = "construction"
        self.board = board
        self._rank = rank
        self._ranks = tuple(ranks)
        self._stage = tuple(stage)
        self._patience = patience
        self._entered: dict[str, int] = {}
        self._hooked: set[object] = set()
        self._post = Post(rank)
        # Reentrant: a FlexModel may be collected, and take its leave, in the midst of anything.
        self._lock = threading.RLock()
        self._over: FlexModelError | None = None
        board.put(self._post)
        self._beat = Beat(self._say, board.any_fault)
        _OPEN.add(self)

    # -- what this rank does ---------------------------------------------------------------

    @property
    def step(self) -> int:
        """The number of the forward begun last; -1 before the first."""
        return self._post.steps[-1][1] if self._post.steps else -1

    def begin_step(self, what: str) -> int:
        """Post that a forward begins; return its number.

        Args:
            what: a word for what it runs, that differs where ranks differ.

        Raises:
            RankFailedError, RankDisagreementError: another rank has failed, or this one has left.
        """
        if self._over is not None:
            raise self._over
        if self._beat.alarmed:
            self._raise_of_others()
        step, runs = self.step + 1, self._post.steps
        if runs and runs[-1][2] == what:
            runs = (*runs[:-1], (runs[-1][0], step, what))
        else:
            runs = (*runs[-_MAX_RUNS + 1 :], (step, step, what))
        self._say(steps=runs)
        return step

    def attached(self, who: object, on: bool) -> None:
        """Post whether anyone has hooks on a model: copies of a FlexModel share their watch."""
        (self._hooked.add if on else self._hooked.discard)(who)
        if bool(self._hooked) != self._post.attached and self._over is None:
            self._say(attached=bool(self._hooked))

    def close(self, uncaught: BaseException | None = None) -> None:
        """Take leave: in good order, or with what ended the program."""
        if self._is_fork() or not self._beat.end() or self._over is not None:
            return
        with suppress(RuntimeError):  # the store may have gone before
            if uncaught is not None:
                fault = Fault(self._rank, _at(uncaught), _cause(uncaught), told_by=self._rank)
                self.board.report(fault)
            self._say(left=True)

    def meet(self) -> None:
        """Wait until every rank has come to build this FlexModel.

        A process group that is being made looks at nobody, so it is made when all are there.

        Raises:
            RankFailedError: under another FlexModel of these ranks one is known to have failed.
        """
        pause = 0.001
        looks = [(watch, watch._look()) for watch in self._of_this_job() if watch is not self]
        while not self.board.has_all(self._ranks):
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
            for watch, look in looks:
                fault = watch._asked(look)
                if fault is not None:
                    raise self._stopped(fault)

    # -- waiting ---------------------------------------------------------------------------

    def enter(self, name: str, members: Sequence[int], where: str | None = None) -> Wait:
        """Count a collective of ours as begun on this rank; what to post of it in waiting.

        Args:
            name: of the group, the same on its ranks.
            members: global ranks that take part.
            where: what it is for, the same on all of them; None for where this rank is at.
        """
        number = self._entered[name] = self._entered.get(name, 0) + 1
        return Wait(name, tuple(members), number, where or self.where)

    def finish(self, work: Waitable, wait: Wait, group: object) -> None:
        """Wait for a collective of ours on the CPU.

        Args:
            work: the collective, begun asynchronously.
            wait: what was entered.
            group: the group itself, which has to outlive a collective that is given up.

        Raises:
            RankFailedError: a peer has failed or ended.
            RankDisagreementError: a peer will not come, since it runs something else.
        """
        look: Look | None = None
        while not self._finished(work, look):
            if look is None:
                look = self._look()
                self._say(wait=wait)
            fault = self._asked(look)
            if fault is not None:
                _keep_for_good(work, group)
                raise self._stopped(fault)
        if look is not None:
            self._say(wait=None)

    def _finished(self, work: Waitable, look: Look | None) -> bool:
        """Wait for a slice of time."""
        try:
            work.wait(_SLICE)
        except RuntimeError:
            if not work.is_completed():
                return False
            try:
                work.wait()
            except RuntimeError as error:
                raise self._stopped(self._behind(error, look)) from error
        return True

    def _behind(self, error: BaseException, look: Look | None = None) -> Fault:
        """Who is behind a broken connection: looks until a rank is known to have gone."""
        look = look or self._look()
        deadline = time.monotonic() + _BEHIND_SECONDS
        while time.monotonic() < deadline:
            fault = self._asked(look, broken=True)
            if fault is not None:
                return fault
            time.sleep(0.1)
        return Fault(self._rank, self.where, f"its connection to another rank broke: {error}")

    def _now(self) -> Post:
        """What this rank posted last, with what it has entered since."""
        return replace(self._post, entered=self._entered)

    def _look(self) -> Look:
        return Look(self.board, self._rank, self._ranks, self._stage, self._patience)

    def _asked(self, look: Look, broken: bool = False) -> Fault | None:
        """Why this rank waits in vain, be it that nobody can be asked any more."""
        try:
            return look.in_vain(self._post, broken)
        except RuntimeError as error:
            cause = (
                "the store in which ranks tell each other of faults is gone, and with it the "
                f"process that hosted it: rank 0, unless a launcher did ({error})."
            )
            return Fault(self._rank, self.where, cause)

    # -- failing ---------------------------------------------------------------------------

    def failed(self, where: str, error: Exception) -> Exception:
        """What to raise for an exception on this rank, after the others have been told of it.

        If every rank fails alike, all raise their own error and can go on. If this one is alone,
        it is over with it: the others stop where they wait for it in a collective of ours, and in
        the model's own at the latest when its process ends.

        Args:
            where: the hook point, or what else failed; the same on every rank.
            error: what was raised there.
        """
        if hasattr(error, _ANSWER):  # on its way out it passes several places that tell
            return getattr(error, _ANSWER) or error
        if self._over is not None:
            return error
        answer = self._answer(where, error)
        _remember(error, answer)
        return answer

    def _answer(self, where: str, error: Exception) -> Exception:
        if _is_broken_connection(error):
            return self._stopped(self._behind(error))
        with suppress(RuntimeError):  # a store that is gone tells nobody anything
            others = self._faults_of_others()
            if others:
                return self._stopped(others[0])
            if not self._all_alike(where, error):
                differ = isinstance(error, RankDisagreementError)
                self._leave(Fault(self._rank, where, _cause(error), disagreement=differ))
        return error

    def _all_alike(self, where: str, error: Exception) -> bool:
        """Whether every rank fails so, now: waits for those that are behind."""
        event = f"{self.step}/{zlib.crc32(f'{where} {type(error).__name__}'.encode())}"
        deadline = time.monotonic() + _ALIKE_SECONDS
        looks = [(watch, watch._look()) for watch in self._of_this_job()]
        count = self.board.count(event)
        # Failing alike again in one forward adds up: a multiple of the ranks is all of them.
        due = -(-count // len(self._ranks)) * len(self._ranks)
        while count < due and time.monotonic() < deadline:
            time.sleep(0.01)
            count = self.board.counted(event)
            if any(look.past(watch._now()) for watch, look in looks):
                return False
        return count >= due

    def _raise_of_others(self) -> None:
        faults = self._faults_of_others()
        if faults:
            raise self._stopped(faults[0])

    def _faults_of_others(self) -> list[Fault]:
        faults = self.board.faults(rank for rank in self._ranks if rank != self._rank)
        return sorted(faults, key=lambda fault: fault.rank != fault.told_by)

    def _stopped(self, fault: Fault) -> FlexModelError:
        """This rank goes on no longer; the error that says so."""
        self._leave(fault)
        if fault.disagreement:
            error: FlexModelError = RankDisagreementError(f"Ranks disagree: {fault}")
        else:
            cause = fault.cause if fault.rank == self._rank else f"another rank failed: {fault}"
            error = RankFailedError(f"rank {self._rank} stopped at {self.where}, for {cause}")
        self._over = error
        _remember(error, error)
        return error

    def _leave(self, fault: Fault) -> None:
        """Tell the others, under every FlexModel of this process, and leave all process groups.

        A group that something still refers to lives on, as gloo has it, until the process ends.
        """
        for watch in self._of_this_job():
            with suppress(RuntimeError):
                watch.board.report(replace(fault, told_by=watch._rank))
            watch._over = watch._over or RankFailedError(
                f"rank {self._rank} has left its process groups, after: {fault} Start the job anew."
            )
        if dist.is_initialized():
            dist.destroy_process_group()

    def _of_this_job(self) -> list[Watch]:
        """Those of all FlexModels here, but for what an earlier job in this process has left."""
        return [watch for watch in list(_OPEN) if watch.board.store is self.board.store]

    def _is_fork(self) -> bool:
        """Whether this is another process than the rank's, such as a data loader's worker."""
        return os.getpid() != self._post.pid

    def _say(self, **changes: object) -> None:
        """Post; a store that is gone is found out by whoever waits for an answer."""
        if self._is_fork():
            return
        with self._lock, suppress(RuntimeError):  # the beat speaks from a thread of its own
            told = {"entered": dict(self._entered), **changes}
            self._post = replace(self._post, **told)  # type: ignore[arg-type]
            self.board.put(self._post)


_OPEN: weakref.WeakSet[Watch] = weakref.WeakSet()


@atexit.register
def _end_of_program() -> None:
    """Say why: an exception that nobody caught is what the others need to know."""
    uncaught = getattr(sys, "last_value", None)
    for watch in list(_OPEN):
        watch.close(uncaught)


def _remember(error: Exception, answer: Exception) -> None:
    """Note on an exception, not beside it, what it became: its traceback holds activations."""
    with suppress(AttributeError):  # a class with slots takes no note
        setattr(error, _ANSWER, None if answer is error else answer)


def _at(error: BaseException) -> str:
    """The line that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "the program"


def _cause(error: BaseException) -> str:
    told = "".join(traceback.format_exception_only(error)).strip()
    return told.removeprefix(f"{type(error).__module__}.")[:_LONGEST_CAUSE]


def _is_broken_connection(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def _keep_for_good(work: Waitable, group: object) -> None:
    """Never destruct a group with a collective under way: that would wait for the peers' part.

    gloo joins the thread that waits, and the interpreter would do so at its end.
    """
    for item in (work, group):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))
