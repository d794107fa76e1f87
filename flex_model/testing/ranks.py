"""Run a function on N ranks of this machine, from a plain test or script.

    def body(size: int) -> float:
        x = torch.full((size,), dist.get_rank() + 1.0)
        dist.all_reduce(x)
        return x.sum().item()

    run_ranks(body, 2, 4)        # [12.0, 12.0]

The processes are kept between calls, for starting one takes seconds and a process group
milliseconds; each call has a process group of its own. They are ended where a call failed, for a
failed body may have left a framework half set up. Nothing here needs pytest.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from flex_model.testing.rank_worker import LOOPBACK, Call, Failure, Success, pack, serve, unpack

__all__ = ["RankFailure", "RankPool", "run_ranks"]

T = TypeVar("T")

# How long the other ranks may take to end once one has failed. Its leaving makes their collectives
# raise at once, so this is for what they do after that.
_GRACE_SECONDS = 5.0
_LOG_TAIL = 4000
# Imported once, before the ranks' processes are forked off.
_PRELOAD = ["torch", "torch.distributed", "torch.distributed.tensor"]


class RankFailure(RuntimeError):  # noqa: N818 - it tells of failures, in the plural
    """Ranks that raised, died or did not end, each with its number.

    Attributes:
        failures: by rank, in the order in which they failed. ``kind`` is the class name of what
            the body raised, or ``Stuck`` or ``Died``.
    """

    def __init__(self, body: str, world_size: int, failures: Mapping[int, Failure]) -> None:
        self.failures = dict(failures)
        told = (
            f"--- rank {rank}: {failure.kind}: {failure.message}\n{failure.traceback.rstrip()}"
            for rank, failure in failures.items()
        )
        counts = f"{len(failures)} of {world_size} ranks failed in {body}, the first one first"
        super().__init__("\n".join((counts, *told)))


def run_ranks(
    body: Callable[..., T],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    fresh: bool = False,
    **kwargs: Any,
) -> list[T]:
    """Run ``body(*args, **kwargs)`` on ranks 0..N-1 of a new gloo group; return what each returned.

    Args:
        body: a top-level function. ``torch.distributed`` is initialised when it starts and left
            when it ends; framework state that it sets up beyond that it takes down itself.
        world_size: N, the number of ranks.
        *args: picklable arguments, the same for every rank.
        timeout: seconds after which ranks that have not ended are killed.
        fresh: take processes of its own that end with the call, for bodies that kill or hang ranks.
        **kwargs: picklable keyword arguments.

    Raises:
        RankFailure: at least one rank raised, died or was stuck.
        TypeError: the body or an argument cannot be pickled.
    """
    pool = RankPool() if fresh else _shared_pool()
    try:
        return pool.run(body, world_size, args, kwargs, timeout)
    finally:
        if fresh:
            pool.close()


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    log: Path
    log_start: int = 0

    def told(self) -> str:
        """The end of what the process wrote during this call."""
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            return file.read().decode(errors="replace")[-_LOG_TAIL:]

    def stop(self) -> None:
        """End it by its own id, at once: it holds nothing worth keeping."""
        self.connection.close()
        self.process.kill()
        self.process.join()


class RankPool:
    """Processes that serve as ranks, kept between calls; as many as any call has asked for."""

    def __init__(self) -> None:
        # A fork server has torch imported once and forks a rank in milliseconds.
        methods = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context(
            "forkserver" if "forkserver" in methods else "spawn"
        )
        self._context.set_forkserver_preload(_PRELOAD)
        self._workers: list[_Worker] = []
        self._logs = Path(tempfile.mkdtemp(prefix="flex_model_ranks_"))

    def run(
        self,
        body: Callable[..., T],
        world_size: int,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        timeout: float,
    ) -> list[T]:
        """One body on ranks 0..N-1; see `run_ranks`."""
        work = pack((body, tuple(args), dict(kwargs)))
        try:
            outcomes = self._outcomes(work, self._take(world_size), timeout)
        except BaseException:  # an interrupted call leaves ranks in the midst of its body
            self._stop_workers()
            raise
        failures = {rank: o for rank, o in outcomes.items() if isinstance(o, Failure)}
        if failures:
            self._stop_workers()
            raise RankFailure(getattr(body, "__qualname__", repr(body)), world_size, failures)
        return [outcomes[rank].value for rank in range(world_size)]

    def process_ids(self) -> tuple[int, ...]:
        """The ids of the processes, rank 0 first."""
        return tuple(worker.process.pid or 0 for worker in self._workers)

    def close(self) -> None:
        """End every process and remove the pool's files. The pool may be used again after."""
        self._stop_workers()
        shutil.rmtree(self._logs, ignore_errors=True)

    def _outcomes(self, work: bytes, workers: Sequence[_Worker], timeout: float) -> dict[int, Any]:
        # The launcher hosts the store: a rank that dies must not take the others' store with it.
        store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
        for rank, worker in enumerate(workers):
            call = Call(rank, len(workers), store.port, timeout, tuple(sys.path), work)
            worker.connection.send_bytes(pack(call))
        return _Collection(workers, timeout).outcomes()

    def _take(self, world_size: int) -> list[_Worker]:
        if any(not worker.process.is_alive() for worker in self._workers):
            self._stop_workers()
        self._logs.mkdir(exist_ok=True)
        while len(self._workers) < world_size:
            self._workers.append(self._start())
        for worker in self._workers[:world_size]:
            worker.log_start = worker.log.stat().st_size
        return self._workers[:world_size]

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        descriptor, name = tempfile.mkstemp(dir=self._logs)
        os.close(descriptor)
        log = Path(name)
        process = self._context.Process(target=serve, args=(theirs, log), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, log)

    def _stop_workers(self) -> None:
        while self._workers:
            self._workers.pop().stop()


class _Collection:
    """Waiting for the ranks of one call: their outcomes, then their word that they are idle."""

    def __init__(self, workers: Sequence[_Worker], timeout: float) -> None:
        self._waiting = dict(enumerate(workers))
        self._deadline = time.monotonic() + timeout
        self._timeout = timeout
        self._outcomes: dict[int, Any] = {}

    def outcomes(self) -> dict[int, Any]:
        """A Success or Failure for each rank, in the order of their coming."""
        while self._waiting and (left := self._deadline - time.monotonic()) > 0:
            by_connection = {worker.connection: rank for rank, worker in self._waiting.items()}
            for connection in wait(list(by_connection), left):
                self._receive(by_connection[connection])  # type: ignore[index]
        for rank, worker in self._waiting.items():
            self._give_up(rank, worker)
        return self._outcomes

    def _receive(self, rank: int) -> None:
        worker = self._waiting[rank]
        try:
            message = worker.connection.recv_bytes()
        except (EOFError, ConnectionError):
            worker.process.join()
            code = worker.process.exitcode
            self._fail(rank, Failure("Died", f"its process ended, code {code}", worker.told()))
            return
        if message == b"idle":
            del self._waiting[rank]
            return
        outcome: Success | Failure = unpack(message)
        self._outcomes[rank] = outcome
        if isinstance(outcome, Failure):
            self._hurry()

    def _fail(self, rank: int, failure: Failure) -> None:
        self._outcomes[rank] = failure
        del self._waiting[rank]
        self._hurry()

    def _hurry(self) -> None:
        self._deadline = min(self._deadline, time.monotonic() + _GRACE_SECONDS)

    def _give_up(self, rank: int, worker: _Worker) -> None:
        """A rank that never ended: its stack now, unless its body had ended before."""
        if rank not in self._outcomes:
            with suppress(ProcessLookupError):
                os.kill(worker.process.pid or 0, signal.SIGUSR1)
                time.sleep(0.2)
            message = f"not ended {self._timeout:g} s after the start, or after another failed"
            self._outcomes[rank] = Failure("Stuck", message, worker.told())
        worker.stop()


_POOL: list[RankPool] = []


def _shared_pool() -> RankPool:
    """The pool of this process, made at the first call and closed at exit."""
    if not _POOL:
        _POOL.append(RankPool())
        atexit.register(_POOL[0].close)
    return _POOL[0]
