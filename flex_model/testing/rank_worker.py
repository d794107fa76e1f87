"""What runs in a rank's own process: one body after another, each in a process group of its own.

A rank sends its outcome before it leaves the group, so that a body that succeeded is told apart
from one that waits for others. A rank whose body failed leaves at once: its peers' collectives then
raise instead of waiting. A rank whose body succeeded waits for the others first, for a peer may
still be reading from it. Every rank leaves by ``destroy_process_group()``; gloo aborts some
processes that do not.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor._redistribute import (
    _gen_transform_infos,
    clear_redistribute_planner_cache,
)
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

__all__ = ["LOOPBACK", "Call", "Failure", "Success", "pack", "serve", "unpack"]

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Call:
    """One body to run on one rank; ``work`` is the packed ``(body, args, kwargs)``."""

    rank: int
    world_size: int
    port: int
    timeout: float
    import_path: tuple[str, ...]
    work: bytes


@dataclass(frozen=True)
class Success:
    """What the body returned."""

    value: Any


@dataclass(frozen=True)
class Failure:
    """Why the body did not return: the name of the exception's class, its text, its traceback."""

    kind: str
    message: str
    traceback: str


def pack(value: object) -> bytes:
    """Bytes by plain pickle: torch's own reducers would share memory with a process that may die.

    Raises:
        TypeError: ``value`` cannot be pickled, such as a function defined inside another.
    """
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise TypeError(
            f"cannot send {value!r} to another process ({error}); a body, its arguments and its "
            "result must pickle: define functions at the top level of a module"
        ) from error


def unpack(data: bytes) -> Any:
    """The value behind bytes that this very job's launcher or worker packed."""
    return pickle.loads(data)  # noqa: S301, TID251 - a pipe between our own processes, not a file


def serve(connection: Connection, log: Path) -> None:
    """Run calls from the launcher until it closes the connection.

    Args:
        connection: the pipe to the launcher.
        log: where this process's standard output and error go. On SIGUSR1 the stack goes there,
            which is how the launcher learns where a stuck rank stands.
    """
    _write_output_to(log)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    threading.Thread(target=_leave_with_launcher, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            call: Call = unpack(connection.recv_bytes())
        except EOFError:
            return
        _perform(call, connection)


def _perform(call: Call, connection: Connection) -> None:
    """One body: the first message back is its outcome, the second says that the rank is idle."""
    with _rank_environment(call):
        try:
            body, args, kwargs = _prepare(call)
            data = pack(Success(body(*args, **kwargs)))
        except BaseException as error:  # noqa: BLE001 - whatever a body raises is for the launcher
            connection.send_bytes(pack(_failure(error)))
        else:
            connection.send_bytes(data)
            if dist.is_initialized():
                with suppress(RuntimeError):  # a peer that failed tells so itself
                    dist.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()
    connection.send_bytes(b"idle")


def _prepare(call: Call) -> tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]:
    """The body with its arguments, after its process group has been made."""
    store = dist.TCPStore(
        LOOPBACK, call.port, is_master=False, timeout=timedelta(seconds=call.timeout)
    )
    dist.init_process_group(
        "gloo",
        store=store,
        rank=call.rank,
        world_size=call.world_size,
        timeout=timedelta(seconds=call.timeout),
    )
    _forget_meshes()
    sys.path.extend(path for path in call.import_path if path not in sys.path)
    torch.manual_seed(0)
    return unpack(call.work)


def _forget_meshes() -> None:
    """Empty torch's caches of meshes that an earlier body made.

    Meshes of one shape are equal to those caches, but the earlier one's process groups are gone, or
    worse, their names now stand for other ranks.
    """
    _clear_sharding_prop_cache()
    clear_redistribute_planner_cache()
    _gen_transform_infos.cache_clear()


@contextmanager
def _rank_environment(call: Call) -> Iterator[None]:
    """The variables torchrun would set, which frameworks read; put back afterwards."""
    before = dict(os.environ)
    os.environ.update(
        RANK=str(call.rank),
        LOCAL_RANK=str(call.rank),
        WORLD_SIZE=str(call.world_size),
        LOCAL_WORLD_SIZE=str(call.world_size),
        GLOO_SOCKET_IFNAME=_loopback_interface(),
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _loopback_interface() -> str:
    """``lo`` on Linux, ``lo0`` on macOS: gloo must not ask a name server for this host."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _failure(error: BaseException) -> Failure:
    text = "".join(traceback.format_exception(error))
    return Failure(type(error).__name__, str(error), text)


def _write_output_to(log: Path) -> None:
    """Both streams, at the level of file descriptors: a C++ ``terminate`` writes there too."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)


def _leave_with_launcher() -> None:
    """End this process when its launcher has died, even in the midst of a body."""
    launcher = parent_process()
    if launcher is not None:
        launcher.join()
        os._exit(1)
