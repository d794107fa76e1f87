"""The same layer cut over two ranks: Megatron's RowParallelLinear with and without an L2 hook."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from flex_model.importance import MegatronL2NormHook
from frameworks.megatron_cpu import model_parallel
from importance.one_process import INPUTS, OUTPUTS, SHAPE
from timing import Round, Seconds, Way, time_rounds
from traffic import Counting

__all__ = ["measured"]

_CALLS = 8


def measured(rounds: int) -> tuple[list[Round], dict[str, int]]:
    """Rounds of forwards, and bytes that the hook receives per call. A body for one rank."""
    torch.set_num_threads(1)
    with model_parallel(dist.get_world_size()), torch.no_grad():
        layers = {"bare": _layer(), "this library": _layer(), "ModelOpt": _layer()}
        hooks = {"this library": MegatronL2NormHook(), "ModelOpt": _modelopt_hook()}
        for library, hook in hooks.items():
            layers[library].register_forward_hook(hook)
        x = torch.randn(SHAPE[1], SHAPE[0], INPUTS // dist.get_world_size())
        ways = {name: _way(layer, x) for name, layer in layers.items()}
        order = random.Random(0)
        time_rounds(ways, 3, order)
        timed = time_rounds(ways, rounds, order)
        moved = {}
        for library, hook in hooks.items():
            with Counting() as counting:
                hook(layers["bare"], (x,), None)
            moved[library] = sum(size or 0 for _, size in counting.seen.elements())
        return timed, moved


def _layer() -> Any:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=OUTPUTS,
        num_attention_heads=2,
        tensor_model_parallel_size=dist.get_world_size(),
        use_cpu_initialization=True,
    )
    return RowParallelLinear(
        INPUTS,
        OUTPUTS,
        config=config,
        init_method=nn.init.ones_,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
    )


def _modelopt_hook() -> Any:
    from modelopt.torch.prune.importance_hooks.plugins.megatron_hooks import (
        MegatronL2NormHook as Theirs,
    )

    return Theirs()


def _way(layer: nn.Module, x: torch.Tensor) -> Way:
    def way() -> Seconds:
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(_CALLS):
            layer(x)
        return {"call": (time.perf_counter() - begin) / _CALLS}

    return way
