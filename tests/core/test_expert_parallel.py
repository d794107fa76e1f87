"""Hooks at and around experts that are shared out over ranks; truths are the grid's rows.

Between sending tokens to their experts and taking them back no rank holds a part of what one
process has: such hooks are refused on every rank, and hints do not change that.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import pytest
from torch import nn
from torch.distributed.tensor import Shard

from flex_model import FlexModel, HookFunction
from flex_model.errors import LayoutError, RegistrationError
from flex_model.testing.case import Model
from flex_model.testing.ranks import run_ranks
from frameworks import megatron_moe, transformers_moe

KINDS = ("forward", "forward_pre", "full_backward", "full_backward_pre")


def _refused(model: FlexModel, hook: HookFunction, kind: str, *words: str) -> None:
    register: Callable[[HookFunction], None] = getattr(model, f"register_{kind}_hook")
    with pytest.raises(RegistrationError) as caught:
        register(hook)
    for word in (hook.module_name, kind, "rank", "order", "Hook", *words):
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def _refused_inside(
    build: AbstractContextManager[Model], inside: tuple[str, ...], instead: str
) -> None:
    with build as built:
        hooks_before = _hooks_of(built.module)
        with FlexModel(built.module, {}) as model:
            for name in inside:
                for kind in KINDS:
                    _refused(model, HookFunction(name), kind, "ep=2", instead)
                hinted = HookFunction(name, (None, 24), placements={"dp": Shard(0)})
                _refused(model, hinted, "forward", instead)
            with pytest.raises(RegistrationError):
                model.create_hook_group("inside", inside[0])
            assert model.get_group_hook_functions("all") == []
        assert _hooks_of(built.module) == hooks_before


def _hooks_of(module: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_megatron_experts_are_refused(dispatcher: str) -> None:
    """Catches tokens handed out in the order of ranks, or refused with the advice to give a hint,
    which would make just that of them.
    """
    run_ranks(_megatron_refuses, 2, dispatcher)


def _megatron_refuses(dispatcher: str) -> None:
    build = megatron_moe.build(2, dispatcher)
    _refused_inside(build, megatron_moe.INSIDE, "decoder.layers.0.mlp.router")


def _megatron_replicas() -> None:
    """Two ranks with all the experts, each for its own part of the batch."""
    with megatron_moe.build(1) as built, FlexModel(built.module, {}) as model:
        assert model._session.sizes == {"dp": 2}
        _refused(model, HookFunction(megatron_moe.INSIDE[2]), "forward", "ep=1, dp=2")
        # Every rank has every expert: a parameter is the same one.
        name = f"{megatron_moe.INSIDE[2]}.weight"
        assert model.get_module_parameter(name).shape == (80, 24)
        model.register_hook(HookFunction(name))


def test_experts_of_data_parallel_replicas_are_refused() -> None:
    """Catches experts that are not shared out taken for harmless: their tokens are ragged too."""
    run_ranks(_megatron_replicas, 2)


def _megatron_parameters() -> None:
    name = f"{megatron_moe.INSIDE[2]}.weight"
    with megatron_moe.build(2) as built, FlexModel(built.module, {}) as model:
        with pytest.raises(LayoutError, match=rf"{name}.*rank.*counts its experts from zero"):
            model.get_module_parameter(name)
        with pytest.raises(RegistrationError, match=rf"{name}.*rank.*counts its experts from"):
            model.register_hook(HookFunction(name))
        router = "decoder.layers.0.mlp.router.weight"
        assert model.get_module_parameter(router).shape == (4, 24)


def test_parameters_that_are_another_expert_on_each_rank() -> None:
    """Catches the mean of several experts' gradients, or one rank's expert for all of them."""
    run_ranks(_megatron_parameters, 2)


def _transformers_refuses() -> None:
    build = transformers_moe.sharded(2, 2)
    _refused_inside(build, transformers_moe.INSIDE, "model.layers.0.mlp.experts")


def test_below_transformers_experts_is_refused() -> None:
    """Catches a hang: the activation function is called for a rank's own experts alone."""
    run_ranks(_transformers_refuses, 2)


def _transformers_parameter() -> None:
    with (
        transformers_moe.sharded(2, 2) as built,
        transformers_moe.whole() as alone,
        FlexModel(built.module, {}) as model,
    ):
        name = "model.layers.0.mlp.experts.down_proj"
        due = dict(alone.module.named_parameters())[name]
        assert model.get_module_parameter(name).equal(due.detach())


def test_a_transformers_parameter_of_all_experts_is_whole() -> None:
    """Catches slices of experts joined in another order: the tensor tells how it lies."""
    run_ranks(_transformers_parameter, 2)


def _one_process(framework: str) -> None:
    frameworks = {
        "megatron": (partial(megatron_moe.build, 1), megatron_moe.INSIDE),
        "transformers": (transformers_moe.whole, transformers_moe.INSIDE),
    }
    build, inside = frameworks[framework]
    with build() as built, FlexModel(built.module, {}) as model:
        for name in inside:
            model.register_forward_hook(HookFunction(name))


@pytest.mark.parametrize("framework", ["megatron", "transformers"])
def test_one_process_refuses_nothing(framework: str) -> None:
    """Catches a refusal where there is but one order."""
    run_ranks(_one_process, 1, framework)
