"""Stand-ins with which megatron-core 0.16 runs on a CPU: they change placement, never a number.

Megatron allocates buffers on the current CUDA device and keeps its random states on it. Inside
``on_cpu`` the current device is the CPU and those states are the CPU generator's.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random


@contextmanager
def on_cpu() -> Iterator[None]:
    """Megatron's calls for the CUDA device and its generator go to the CPU while inside."""
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (torch.cuda, "current_device", lambda: torch.device("cpu")),
            (torch.cuda, "manual_seed", torch.manual_seed),
            (torch.cuda, "get_rng_state", torch.get_rng_state),
            (megatron_random, "_get_cuda_rng_state", _get_state),
            (megatron_random, "_set_cuda_rng_state", _set_state),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        yield


@contextmanager
def model_parallel(tp: int) -> Iterator[None]:
    """Megatron's groups and random states over the ranks there are."""
    with on_cpu():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
        try:
            megatron_random.model_parallel_cuda_manual_seed(3)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            megatron_random.initialize_rng_tracker(force_reset=True)


def _get_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)
