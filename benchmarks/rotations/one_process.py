"""Online R4 on one process: the fast transform, butterflies one by one, and the dense product."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

import torch
from torch import Tensor

from flex_model.compress.spinquant import fast_hadamard, hadamard_matrix
from timing import Round, Seconds, Way, time_rounds

__all__ = ["SIZES", "TOKENS", "measured"]

SIZES = (1024, 2048, 4096, 8192, 16384, 3072, 14336)
TOKENS = 256


def measured(size: int, rounds: int) -> list[Round]:
    """Rounds of each way on ``[TOKENS, size]``, float32."""
    x = torch.randn(TOKENS, size)
    matrix = hadamard_matrix(size, torch.float32)
    ways: dict[str, Way] = {
        "fast": _way(lambda: fast_hadamard(x)),
        "dense": _way(lambda: x @ matrix),
    }
    if size & (size - 1) == 0:
        ways["butterflies"] = _way(lambda: _butterflies(x))
    time_rounds(ways, 1, random.Random(0))
    return time_rounds(ways, rounds, random.Random(1))


def _way(run: Callable[[], Tensor]) -> Way:
    def way() -> Seconds:
        begin = time.perf_counter()
        run()
        return {"call": time.perf_counter() - begin}

    return way


def _butterflies(x: Tensor) -> Tensor:
    """The textbook's transform: log2(n) passes of sums and differences."""
    size, inner, y = x.shape[-1], 1, x
    while inner < size:
        first, second = y.reshape(-1, 2, inner).unbind(1)
        y = torch.stack((first + second, first - second), 1)
        inner *= 2
    return y.reshape(x.shape) / math.sqrt(size)
