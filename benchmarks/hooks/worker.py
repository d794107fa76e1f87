"""One rank: builds one setting's ways, then times rounds or counts traffic whenever it is asked.

    python -m hooks.worker SETTING DESCRIPTOR

DESCRIPTOR is an open pipe to the launcher; requests and answers on it are JSON. The rank, the
number of ranks and the port of the launcher's store are in torchrun's variables.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from hooks import one_process, two_ranks
from hooks.settings import ONE_PROCESS, TWO_RANKS
from timing import Way, time_rounds

Answer = Callable[[Any], Any]

# Every wait for another rank ends: longer than any stretch of work between two collectives.
_TIMEOUT = timedelta(seconds=60)
_WARM_UPS = 5  # rounds


def main(setting: str, descriptor: int) -> None:
    """Answer until the launcher closes the pipe."""
    torch.set_num_threads(1)
    connection = Connection(descriptor)
    _join()
    try:
        answers = _SETTINGS[setting]()
        _send(connection, {name: version(name) for name in ("flex-model", "torch", "transformers")})
        while (request := _receive(connection)) is not None:
            _send(connection, answers[request["what"]](request.get("rounds")))
    finally:
        dist.destroy_process_group()


def _join() -> None:
    environment = os.environ
    store = dist.TCPStore(
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        is_master=False,
        timeout=_TIMEOUT,
    )
    rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=_TIMEOUT)


def _one_process() -> dict[str, Answer]:
    return {"time": _timer(one_process.ways())}


def _two_ranks() -> dict[str, Answer]:
    sharded = two_ranks.Sharded()

    def traffic(_: Any) -> Any:
        return {
            way: {half: told.encoded() for half, told in halves.items()}
            for way, halves in sharded.traffic().items()
        }

    return {
        "time": _timer(sharded.ways()),
        "time beginnings": _timer(sharded.beginnings()),
        "traffic": traffic,
    }


def _timer(ways: dict[str, Way]) -> Answer:
    order = random.Random(0)
    time_rounds(ways, _WARM_UPS, order)
    return lambda rounds: time_rounds(ways, rounds, order)


def _send(connection: Connection, message: Any) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _receive(connection: Connection) -> Any:
    try:
        return json.loads(connection.recv_bytes())
    except EOFError:
        return None


_SETTINGS = {ONE_PROCESS.name: _one_process, TWO_RANKS.name: _two_ranks}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
