"""``get_module_parameter``: the whole parameter to the bit, wherever frameworks keep its parts."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor

from flex_model import FlexModel, HookFunction
from flex_model.errors import ConfigurationError
from flex_model.testing.case import Case
from flex_model.testing.ranks import run_ranks
from frameworks import tiny_llama
from frameworks.rows import row

ROWS = (
    "ddp",
    "ddp x tp",
    "dtensor",
    "dtensor uneven",
    "dtensor uneven empty",
    "fairscale",
    "fsdp1",
    "fsdp1 flat",
    "fsdp1 hybrid",
    "fsdp2",
    "fsdp2 hybrid",
    "fsdp2 x tp",
    "megatron",
    "transformers",
    "transformers tp x fsdp",
    "accelerate prepare",
    "accelerate device map x dp",
)

Values = dict[str, Tensor]


def _values(case: Case) -> Values:
    with case.whole() as model:
        return {name: value.detach().clone() for name, value in model.module.named_parameters()}


def _wrong(flex: FlexModel, due: Values, when: str) -> list[str]:
    found = {name: flex.get_module_parameter(name) for name in due}
    return [f"{name} {when}" for name, value in due.items() if not torch.equal(found[name], value)]


def _wrong_in_a_job(case: Case, due: Values) -> list[str]:
    with case.sharded() as model:
        flex = FlexModel(model.module, {}, case.tp, 1, case.dp)
        wrong = _wrong(flex, due, "at first")
        model.logits(flex, torch.arange(10).view(2, 5))
        wrong += _wrong(flex, due, "after a forward")
        model.logits(flex, torch.arange(10).view(2, 5)).sum().backward()
        return wrong + _wrong(flex, due, "after a backward")


@pytest.mark.parametrize("name", ROWS)
def test_every_parameter_is_that_of_one_process(name: str) -> None:
    case = row(name)
    due = run_ranks(_values, 1, case)[0]
    assert run_ranks(_wrong_in_a_job, case.world_size, case, due) == [[]] * case.world_size


def _wrong_in_edits(case: Case, due: Values) -> list[str]:
    wrong: list[str] = []

    def edit(module, inputs, save_ctx, modules):
        wrong.extend(_wrong(flex, due, "in an edit"))
        return inputs * 2

    with case.sharded() as model:
        flex = FlexModel(model.module, {}, case.tp, 1, case.dp)
        for name in ("layers.0.feed_forward.w1", "layers.1", "output"):
            flex.register_forward_hook(HookFunction(name, editing_function=edit))
        model.logits(flex, torch.arange(10).view(2, 5)).sum().backward()
    return wrong


@pytest.mark.parametrize(
    "name", ["ddp x tp", "fsdp1", "fsdp1 flat", "fsdp2", "fsdp2 x tp", "accelerate device map x dp"]
)
def test_an_editing_function_may_ask_for_any_parameter(name: str) -> None:
    case = row(name)
    due = run_ranks(_values, 1, case)[0]
    assert run_ranks(_wrong_in_edits, case.world_size, case, due) == [[]] * case.world_size


def _shape_captured(case: Case) -> tuple[int, ...]:
    records: dict[str, list[Tensor]] = {}
    with case.sharded() as model:
        flex = FlexModel(model.module, records)
        flex.register_forward_hook(HookFunction(model.embedding))
        model.logits(flex, torch.arange(10).view(2, 5))
    return next((tuple(record[0].shape) for record in records.values()), ())


@pytest.mark.parametrize(
    "name",
    ["ddp x tp", "fsdp1", "fsdp1 hybrid", "fsdp2", "fsdp2 hybrid", "fsdp2 x tp"],
)
def test_sizes_are_read_off_the_model(name: str) -> None:
    case = row(name)
    shapes = run_ranks(_shape_captured, case.world_size, case)
    assert shapes[0] == (2 * case.dp, 5, tiny_llama.HIDDEN)


def _under_both_names(case: Case) -> None:
    with case.sharded() as model:
        records: dict[str, list[Tensor]] = {}
        flex = FlexModel(model.module, records)
        for name in ("layers.0", "module.layers.0"):
            flex.register_forward_hook(HookFunction(name))
        model.logits(flex, torch.arange(10).view(2, 5))
        assert list(records) in (["layers.0"], [])  # one hook point
        assert not any(name.startswith("module") for name in flex.wrapped_module_names)
        both = [flex.get_module_parameter(f"{part}norm.weight") for part in ("", "module.")]
        assert torch.equal(*both)


def test_ddp_shows_in_no_name() -> None:
    """A model of one process, which is not wrapped, runs the same lines with the same draws."""
    run_ranks(_under_both_names, 2, row("ddp"))


@pytest.mark.parametrize("preloaded", [None, ["Block"]])
def test_offloaded_weights_are_fetched(preloaded: list[str] | None) -> None:
    """Each module's own hook holds its weights, or the hook of a block around it, in a chain."""
    model, due = tiny_llama.filled(), dict(tiny_llama.filled().named_parameters())
    cpu_offload(model, "cpu", preload_module_classes=preloaded)
    add_hook_to_module(model.layers[1], ModelHook(), append=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert _wrong(FlexModel(model, {}), due, "offloaded") == []


def test_a_parameter_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = tiny_llama.TinyLlama()
    with pytest.raises(ConfigurationError, match=r"norm\.weight is on the meta device"):
        FlexModel(model, {}).get_module_parameter("norm.weight")
