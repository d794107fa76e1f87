"""Stand-ins with which megatron-core 0.16 runs on a CPU: they change placement, never a number.

Megatron allocates buffers on the current CUDA device and keeps its random states on it. Inside
``on_cpu`` the current device is the CPU, those states are the CPU generator's, and the streams on
which the experts' token counts go to the host are none.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils, token_dispatcher


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
            (schedules, "torch", _TorchOnCpu()),
            (torch.cuda, "Stream", _NoStream),
            (torch.cuda, "current_stream", _NoStream),
            (torch.cuda, "stream", nullcontext),
            (token_dispatcher, "maybe_move_tensor_to_cpu", _on_host),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        # Routers ask for it, but it is there only where Transformer Engine is.
        stack.enter_context(patch.object(moe_utils, "te_general_gemm", None, create=True))
        yield


@contextmanager
def model_parallel(tp: int, ep: int = 1, pp: int = 1) -> Iterator[None]:
    """Megatron's groups and random states over the ranks there are."""
    with on_cpu():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            expert_model_parallel_size=ep,
            pipeline_model_parallel_size=pp,
        )
        try:
            megatron_random.model_parallel_cuda_manual_seed(3)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            megatron_random.initialize_rng_tracker(force_reset=True)


class _TorchOnCpu:
    """The torch that Megatron's schedules see: they count tokens in a tensor on ``"cuda"``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, **options)


def _get_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


class _NoStream:
    """A stream or an event of one: what is to be waited for is done already."""

    def wait_stream(self, other: "_NoStream") -> None:
        pass

    def record_event(self) -> "_NoStream":
        return self

    def synchronize(self) -> None:
        pass


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The counts as Megatron has them after their copy to the host."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
