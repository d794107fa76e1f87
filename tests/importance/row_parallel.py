"""One row-parallel layer in every framework, and all hooks on it: the whole layer is the truth."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from flex_model.importance import (
    AttentionHeadHook,
    ForwardHook,
    Heads,
    IndependentChannelContributionHook,
    IndependentKvHeadContributionHook,
    IterativeChannelContributionHook,
    L2NormHook,
    MegatronL2NormHook,
)

INPUTS, OUTPUTS, CALLS = 24, 10, 5
FRAMEWORKS = ("megatron", "fairscale", "dtensor")
CONFIG = SimpleNamespace(num_attention_heads=12, hidden_size=INPUTS, head_dim=2)

HOOKS: dict[str, Callable[[nn.Module], ForwardHook]] = {
    "l2": lambda layer: L2NormHook(),
    "l2 per token": lambda layer: L2NormHook(per_token=True),
    "l2 batch first": lambda layer: L2NormHook(sequence_dim=1),
    "megatron l2": lambda layer: MegatronL2NormHook(),
    "independent": IndependentChannelContributionHook,
    "iterative": lambda layer: IterativeChannelContributionHook(
        layer, {"validation_full_iters": CALLS}
    ),
    "iterative scaled": lambda layer: IterativeChannelContributionHook(
        layer, {"validation_full_iters": CALLS, "calibration_method": "scale_by_magnitude"}
    ),
    "kv heads": lambda layer: _kv(layer, 4, "memory"),
    "kv heads at once": lambda layer: _kv(layer, 4, "latency"),
    "kv heads < ranks": lambda layer: _kv(layer, 1, "memory"),
    "heads": lambda layer: AttentionHeadHook(layer, Heads.of(CONFIG, 4)),
}


def _kv(layer: nn.Module, kv_heads: int, optimize_for: str) -> ForwardHook:
    kwargs = {
        "model": SimpleNamespace(config=CONFIG),
        "block_config": SimpleNamespace(attention=SimpleNamespace(num_key_value_heads=kv_heads)),
        "optimize_for": optimize_for,
    }
    return IndependentKvHeadContributionHook(layer, kwargs)


def values() -> tuple[Tensor, Tensor, list[Tensor]]:
    """The whole weight and bias, and the whole inputs, ``[sequence, batch, channels]``.

    Channels differ in size by far more than rounding does, so that ranks are exact.
    """
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    bias = torch.randn(OUTPUTS, generator=generator) * 0.1
    sizes = torch.linspace(0.5, 2.0, INPUTS)[torch.randperm(INPUTS, generator=generator)]
    inputs = [
        torch.randn(6 + call, 3, INPUTS, generator=generator) * sizes for call in range(CALLS)
    ]
    return weight, bias, inputs


def whole_layer() -> nn.Linear:
    weight, bias, _ = values()
    layer = nn.Linear(INPUTS, OUTPUTS)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


@contextmanager
def row_parallel(framework: str) -> Iterator[nn.Module]:
    """This rank's part of the same layer, which adds its bias."""
    weight, bias, _ = values()
    with _groups(framework):
        layer = _made(framework)
        if framework != "dtensor":
            with torch.no_grad():
                layer.weight.copy_(own_channels(weight))
                layer.bias.copy_(bias)
        yield layer


def own_channels(whole: Tensor) -> Tensor:
    return whole.chunk(dist.get_world_size(), -1)[dist.get_rank()].contiguous()


def _made(framework: str) -> Any:
    if framework == "megatron":
        from megatron.core.tensor_parallel import RowParallelLinear
        from megatron.core.transformer.transformer_config import TransformerConfig

        config = TransformerConfig(
            num_layers=1, hidden_size=INPUTS, num_attention_heads=4,
            tensor_model_parallel_size=dist.get_world_size(), use_cpu_initialization=True,
        )  # fmt: skip
        return RowParallelLinear(
            INPUTS, OUTPUTS, config=config, init_method=nn.init.zeros_, bias=True,
            input_is_parallel=True, skip_bias_add=False,
        )  # fmt: skip
    if framework == "fairscale":
        from fairscale.nn.model_parallel.layers import RowParallelLinear as FairscaleLinear

        return FairscaleLinear(INPUTS, OUTPUTS, input_is_parallel=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    plan = RowwiseParallel(input_layouts=Shard(-1))
    return parallelize_module(whole_layer(), mesh, plan)


@contextmanager
def _groups(framework: str) -> Iterator[None]:
    if framework == "megatron":
        from frameworks.megatron_cpu import model_parallel

        with model_parallel(dist.get_world_size()):
            yield
    elif framework == "fairscale":
        from fairscale.nn.model_parallel import initialize

        initialize.initialize_model_parallel(dist.get_world_size())
        try:
            yield
        finally:
            initialize.destroy_model_parallel()
    else:
        with nullcontext():
            yield


@dataclass
class Scores:
    """What a hook gives in the end, and its state halfway."""

    result: dict[str, Tensor]
    state: dict[str, Any]


def run(hook: ForwardHook, inputs: list[Tensor], layer: nn.Module) -> Scores:
    """Call a layer with its hook registered as torch's own."""
    state: dict[str, Any] = {}
    handle = layer.register_forward_hook(hook)
    for call, given in enumerate(inputs):
        with torch.no_grad():
            layer(given)
        if call == CALLS // 2:
            state = hook.state_dict()
    handle.remove()
    return Scores(hook.to_dict(), state)


def truth(name: str) -> Scores:
    """One process, with the whole layer."""
    layer = whole_layer()
    return run(HOOKS[name](layer), values()[2], layer)
