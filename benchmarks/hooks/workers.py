"""Starting one worker per rank, asking them all the same, and ending them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from torch.distributed import TCPStore

from hooks.settings import Setting

__all__ = ["WorkerError", "Workers", "started"]

_LOOPBACK = "127.0.0.1"
_START_SECONDS = 120.0  # imports, at worst from a cold disk
_LEAVE_SECONDS = 20.0
_TOLD = 3000


class WorkerError(RuntimeError):
    """A worker died or did not answer in time; the text is the end of what it wrote."""


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    output: IO[bytes]

    def receive(self, deadline: float) -> Any:
        try:
            if self.connection.poll(max(0.0, deadline - time.monotonic())):
                return json.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            pass
        raise WorkerError(self._told())

    def _told(self) -> str:
        self.output.seek(0)
        return self.output.read().decode(errors="replace")[-_TOLD:].strip() or "it did not answer"

    def leave(self) -> None:
        self.connection.close()
        try:
            self.process.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.output.close()


class Workers:
    """The ranks of one setting under one library. They wait, and use no time, between requests."""

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._workers = workers

    def facts(self) -> Any:
        """What rank 0 tells of itself; comes first, and waits until every rank is ready.

        Raises:
            WorkerError: a rank did not get ready.
        """
        return self._answers(_START_SECONDS)[0]

    def ask(self, seconds: float = 60.0, **request: Any) -> list[Any]:
        """Every rank's answer to one request.

        Raises:
            WorkerError: a rank died, or did not answer in so many seconds.
        """
        message = json.dumps(request).encode()
        for worker in self._workers:
            worker.connection.send_bytes(message)
        return self._answers(seconds)

    def _answers(self, seconds: float) -> list[Any]:
        deadline = time.monotonic() + seconds
        return [worker.receive(deadline) for worker in self._workers]


@contextmanager
def started(python: Path, setting: Setting) -> Iterator[Workers]:
    """Workers under an interpreter, which decides the library, for as long as inside."""
    store = TCPStore(_LOOPBACK, 0, is_master=True, wait_for_workers=False)
    workers = [_start(python, setting, rank, store.port) for rank in range(setting.ranks)]
    try:
        yield Workers(workers)
    finally:
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.leave()


def _start(python: Path, setting: Setting, rank: int, port: int) -> _Worker:
    ours, theirs = Pipe()
    output = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the worker has left
    environment = {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": _LOOPBACK,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(setting.ranks),
        "LOCAL_WORLD_SIZE": str(setting.ranks),
        "GLOO_SOCKET_IFNAME": _loopback_interface(),
    }
    # -P: not from the current folder either, where this library lies open.
    process = subprocess.Popen(
        (str(python), "-P", "-m", "hooks.worker", setting.name, str(theirs.fileno())),
        env=os.environ | environment,
        pass_fds=(theirs.fileno(),),
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    theirs.close()
    return _Worker(process, ours, output)


def _loopback_interface() -> str:
    """``lo`` on Linux, ``lo0`` on macOS: gloo must not ask a name server for this host."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
