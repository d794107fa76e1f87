"""Online R4 of an activation that two ranks share out: pair exchanges against gathering it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flex_model.compress.spinquant import fast_hadamard
from flex_model.compress.spinquant.orthogonal import Hadamard
from flex_model.compress.spinquant.sharded import Cut, Split, turn
from flex_model.distributed.communicator import Communicator
from rotations.one_process import TOKENS
from timing import Round, Seconds, Way, time_rounds

__all__ = ["measured"]


def measured(size: int, rounds: int) -> list[Round]:
    """Rounds of both ways on this rank's ``[TOKENS, size / ranks]``. A body for one rank."""
    torch.set_num_threads(1)
    group: Any = dist.group.WORLD
    cut = Cut.of([Split(Communicator(group))], size)
    x = torch.randn(TOKENS, len(cut.held))
    ways: dict[str, Way] = {
        "exchange": _way(lambda: turn(x, -1, Hadamard(size), cut)),
        "gather": _way(lambda: cut.part(fast_hadamard(cut.gathered(x, 1)), 1)),
    }
    time_rounds(ways, 2, random.Random(0))
    return time_rounds(ways, rounds, random.Random(1))


def _way(run: Callable[[], Tensor]) -> Way:
    def way() -> Seconds:
        dist.barrier()
        begin = time.perf_counter()
        run()
        return {"call": time.perf_counter() - begin}

    return way
