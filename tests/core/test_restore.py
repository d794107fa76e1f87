"""Leaving: the wrapped model is bit for bit what it was, however the wrapper ended."""

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_models import batch, close, ways, whole
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from flex_model import DummyModule, FlexModel, HookFunction
from flex_model.errors import UnknownModuleError
from flex_model.testing.ranks import run_ranks

KINDS = ("forward", "forward_pre", "full_backward", "full_backward_pre")

Records = dict[str, list[Tensor]]


def _double(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x * 2


def _everything(model: nn.Module) -> dict[str, Any]:
    """All that a module or parameter carries, hooks included, by value."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            plain = dict(value) if isinstance(value, dict) else value
            found[f"{name}.{key}"] = plain
        found[f"{name} class"] = type(module)
    for name, tensor in model.named_parameters():
        found[f"{name} hooks"] = dict(tensor._backward_hooks or {})
        found[f"{name} value"] = tensor.detach().clone()
        found[f"{name} leaf"] = (tensor.requires_grad, tensor.is_leaf, type(tensor), id(tensor))
    return found


def _assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, Tensor) and name.endswith(" value"):
            assert torch.equal(value, after[name]), name
        else:
            assert value is after[name] or value == after[name], f"{name}: {value}, {after[name]}"


def _hook_all(flex: FlexModel, edit: Callable[..., Tensor] | None = _double) -> list[HookFunction]:
    hooks = []
    for kind in KINDS:
        for site in ("0.norm", "0.up", "0.down", "0", ""):
            hooks.append(HookFunction(site, editing_function=edit))
            getattr(flex, f"register_{kind}_hook")(hooks[-1])
    for name in ("0.up.weight", "0.down.bias"):
        hooks.append(HookFunction(name, editing_function=edit))
        flex.register_hook(hooks[-1])
    return hooks


@pytest.fixture
def model() -> nn.Sequential:
    made = whole()
    made[0].up.register_forward_hook(lambda module, args, out: out + 1)
    made[0].down.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    return made


@pytest.fixture
def before(model: nn.Sequential) -> Iterator[dict[str, Any]]:
    x = batch()
    due = model(x)
    found = _everything(model)
    yield found
    _assert_same(found, _everything(model))
    assert torch.equal(model(x), due)


@pytest.mark.usefixtures("before")
class TestNothingIsLeftBehind:
    """Catches a hook, a flag or a changed value that outlives the wrapper."""

    def test_restore(self, model: nn.Sequential) -> None:
        flex = FlexModel(model, {})
        _hook_all(flex)
        assert flex.restore() is model
        assert flex.restore() is model, "and again"

    def test_restore_after_a_step(self, model: nn.Sequential) -> None:
        flex = FlexModel(model, {})
        _hook_all(flex)
        flex(batch()).sum().backward()
        flex.restore()
        model.zero_grad()

    def test_a_context(self, model: nn.Sequential) -> None:
        with FlexModel(model, {}) as flex:
            _hook_all(flex)
            flex(batch())

    def test_an_error_in_a_context(self, model: nn.Sequential) -> None:
        def fails() -> None:
            with FlexModel(model, {}) as flex:
                _hook_all(flex)
                raise KeyError

        with pytest.raises(KeyError):
            fails()

    def test_an_error_in_the_forward(self, model: nn.Sequential) -> None:
        flex = FlexModel(model, {})
        _hook_all(flex)
        with pytest.raises(RuntimeError):
            flex(torch.ones(3, 99))
        flex.restore()

    def test_an_error_in_the_backward(self, model: nn.Sequential) -> None:
        def fails(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
            raise KeyError

        flex = FlexModel(model, {})
        flex.register_full_backward_hook(HookFunction("0.up", editing_function=fails))
        with pytest.raises(KeyError):
            flex(batch()).sum().backward()
        flex.restore()
        model.zero_grad()

    def test_a_registration_that_fails(self, model: nn.Sequential) -> None:
        flex = FlexModel(model, {})
        for kind in KINDS:
            with pytest.raises(UnknownModuleError):
                getattr(flex, f"register_{kind}_hook")(HookFunction("nowhere"))
        with pytest.raises(UnknownModuleError):
            flex.create_hook_group("x", "nowhere")

    def test_a_wrapper_that_is_dropped(self, model: nn.Sequential) -> None:
        flex = FlexModel(model, {})
        _hook_all(flex)
        flex(batch())
        del flex
        gc.collect()

    def test_a_wrapper_that_is_dropped_in_the_midst_of_an_error(self, model: nn.Sequential) -> None:
        def lives_shortly() -> None:
            flex = FlexModel(model, {})
            _hook_all(flex)
            flex(torch.ones(3, 99))

        with pytest.raises(RuntimeError):
            lives_shortly()
        gc.collect()

    def test_groups_switched_off(self, model: nn.Sequential) -> None:
        flex = FlexModel(model, {})
        flex.update_hook_groups(_hook_all(flex)[:2], "some")
        flex(batch(), groups="some", complement=True)
        flex.restore()

    def test_trainable_modules(self, model: nn.Sequential) -> None:
        flex = FlexModel(model, {})
        flex.register_trainable_module("probe", nn.Linear(2, 2))
        flex.restore()
        assert list(flex.trainable_modules) == ["probe"]

    def test_a_deepcopy(self, model: nn.Sequential) -> None:
        flex = FlexModel(model, {})
        _hook_all(flex)
        other = copy.deepcopy(flex)
        flex.restore()
        other.restore()


def test_hook_functions_may_be_registered_again() -> None:
    """Catches a HookFunction that remembers where it was."""
    hook, model, x = HookFunction("0", editing_function=_double), whole(), batch()
    due = model(x)
    for _ in range(2):
        records: Records = {}
        flex = FlexModel(model, records)
        for _ in range(2):
            flex.register_forward_hook(hook)
            assert torch.equal(flex(x), due * 2)
            flex.restore()
            assert torch.equal(flex(x), due)
        assert len(records["0"]) == 2


def test_one_hook_function_in_two_wrappers() -> None:
    """Catches state on the HookFunction: two wrappers would write to one of them."""
    hook = HookFunction("0")
    one, two = {}, {}
    first, second = FlexModel(whole(), one), FlexModel(whole(), two)
    first.register_forward_hook(hook)
    second.register_forward_pre_hook(hook)
    first(batch())
    assert list(one) == ["0"]
    assert two == {}
    second(batch(2))
    assert torch.equal(two["0"][0], batch(2))
    assert len(one["0"]) == 1


@pytest.mark.parametrize("kind", ["full_backward", "full_backward_pre"])
@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_two_wrappers_of_one_model(kind: str, first_leaves_first: bool) -> None:
    """Catches a wrapper that takes with it what the other still needs: torch marks a module that
    has full backward hooks once for all of them.
    """
    model = whole()
    records: list[Records] = [{}, {}]
    wrappers = [FlexModel(model, record) for record in records]
    for flex in wrappers:
        getattr(flex, f"register_{kind}_hook")(HookFunction("0.up"))
    model(batch()).sum().backward()
    leaving, staying = (0, 1) if first_leaves_first else (1, 0)
    wrappers[leaving].restore()
    model(batch()).sum().backward()
    assert len(records[leaving]["0.up"]) == 1
    assert len(records[staying]["0.up"]) == 2
    assert torch.equal(*records[staying]["0.up"])
    wrappers[staying].restore()
    assert model[0].up._is_full_backward_hook is None


def test_a_hook_of_the_users_own_that_came_later_stays() -> None:
    """Catches the same for a plain torch hook, which would then be called as a legacy one."""
    model, seen = whole(), []
    flex = FlexModel(model, {})
    flex.register_full_backward_hook(HookFunction("0.up"))
    model[0].up.register_full_backward_hook(
        lambda m, grad_input, grad_output: seen.append(grad_input)
    )
    model(batch()).sum().backward()
    flex.restore()
    model(batch()).sum().backward()
    assert len(seen) == 2
    assert torch.equal(seen[0][0], seen[1][0])


# -- copies ------------------------------------------------------------------------------------


def test_a_deepcopy_is_a_wrapper_of_its_own() -> None:
    """Catches flex-model 0.1.0's failure, and a copy whose hooks write to the original."""
    records: Records = {}
    model = whole()
    flex = FlexModel(model, records, seed=3)
    trained = nn.Linear(6, 6)
    flex.register_trainable_module("probe", trained)
    hook = HookFunction("0", editing_function=lambda m, x, ctx, modules: modules["probe"](x))
    flex.register_forward_hook(hook)
    flex.update_hook_groups(hook, "mine")
    other = copy.deepcopy(flex)
    with torch.no_grad():
        trained.weight.zero_()
        model[0].down.bias.add_(5)
    assert other.module is not model
    assert other.trainable_modules["probe"] is not trained
    other(batch())
    assert records == {}
    assert len(other.output_ptr["0"]) == 1
    assert other.output_ptr["0"][0].abs().sum() > 0
    assert [h.module_name for h in other.get_group_hook_functions("mine")] == ["0"]
    assert flex.get_group_hook_functions("mine") == [hook]
    flex(batch())
    assert len(records["0"]) == 1
    assert not torch.equal(records["0"][0], other.output_ptr["0"][0])
    other.restore()
    flex(batch())
    assert len(records["0"]) == 2, "the original's hooks are still on"
    flex.restore()


def _copied_on_ranks() -> None:
    for way in ways():
        model = way.model()
        due = model(way.leaf()).detach()
        with way.flex(model, {}) as flex:
            flex.register_forward_hook(HookFunction("0.up", editing_function=_double))
            edited = flex(way.leaf()).detach()
            other = copy.deepcopy(flex)
            close(other(way.leaf()), edited, "the copy's edit")
            other.restore()
            close(other(way.leaf()), due, "the copy, restored")
            close(flex(way.leaf()), edited, "the original")
        assert torch.equal(model(way.leaf()), due)


def test_a_deepcopy_on_ranks() -> None:
    """Catches process groups copied, which cannot be, and layouts shared between copies."""
    run_ranks(_copied_on_ranks, 2)


# -- the wrapped model is reached --------------------------------------------------------------


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def test_generate_and_attributes_reach_the_wrapped_model(llama: LlamaForCausalLM) -> None:
    """Catches a wrapper that hides what the model can do; hooks run in ``generate``, too."""
    records: Records = {}
    prompt = torch.tensor([[3, 4, 5]])
    due = llama.generate(prompt, max_new_tokens=4, do_sample=False)
    with FlexModel(llama, records) as model:
        model.register_forward_hook(HookFunction("model.layers.1.mlp"))
        assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), due)
        assert [tuple(record.shape) for record in records["model.layers.1.mlp"]] == [
            (1, 3, 8),
            *[(1, 1, 8)] * 3,
        ]
        assert model.config is llama.config
        assert model.dtype == torch.float32
        assert model.get_input_embeddings() is llama.model.embed_tokens
        assert model.lm_head is llama.lm_head
        with pytest.raises(AttributeError, match="nothing_of_the_kind"):
            _ = model.nothing_of_the_kind
        assert not hasattr(model, "nothing_of_the_kind")


def test_modes_and_parameters_reach_the_wrapped_model() -> None:
    """Catches ``train``, ``to`` and ``zero_grad`` that stop at the wrapper."""
    model = whole()
    with FlexModel(model, {}) as flex:
        flex.register_trainable_module("probe", nn.Linear(2, 2))
        flex.eval()
        assert not model[0].training
        assert not flex.trainable_modules["probe"].training
        flex.to(torch.float64)
        assert model[0].up.weight.dtype == torch.float64
        flex.float().train()
        names = [name for name, _ in flex.named_parameters()]
        assert names[: len(list(model.parameters()))] == [n for n, _ in model.named_parameters()]
        assert names[-2:] == ["trainable_modules.probe.weight", "trainable_modules.probe.bias"]
        assert len(list(flex.parameters())) == len(names)
        assert flex.wrapped_module_names == [name for name, _ in model.named_modules()]
        assert flex.trainable_modules_names == ["probe"]
        assert flex.all_modules_names == [*flex.wrapped_module_names, "probe"]
        flex(batch()).sum().backward()
        flex.zero_grad()
        assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_buffers_and_state() -> None:
    """Catches buffers of the model, or of a trainable module, left out."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    with FlexModel(model, {}) as flex:
        flex.register_trainable_module("probe", nn.BatchNorm1d(3))
        names = [name for name, _ in flex.named_buffers()]
        assert names[:3] == [name for name, _ in model.named_buffers()]
        assert names[3:] == [f"trainable_modules.probe.{n}" for n, _ in model[0].named_buffers()]
        assert len(list(flex.buffers())) == 6


@pytest.mark.parametrize("value", [torch.ones(2), (torch.ones(1), None), {"x": 1}, "text", None])
def test_a_dummy_module_gives_back_what_it_gets(value: Any) -> None:
    """Catches a place to hook that changes what passes."""
    assert DummyModule()(value) is value


def test_a_dummy_module_is_a_place_to_hook() -> None:
    """Catches a dummy that is edited for show: what follows must see the edit."""

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = DummyModule()

        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return self.scores(q @ k.mT).sum()

    q = torch.ones(2, 3)
    with FlexModel(Scores(), {}) as model:
        model.register_forward_hook(HookFunction("scores", editing_function=_double))
        assert model(q, q).item() == 24


def test_names_through_a_sequential_of_named_children() -> None:
    """Catches flex-model 0.1.0's ValueError on named children of ``Sequential``."""
    records: Records = {}
    net = nn.Sequential()
    net.add_module("embed", nn.Linear(2, 2))
    net.add_module("inner", nn.Sequential(nn.ReLU()))
    with FlexModel(net, records) as model:
        for name in ("embed", "inner", "inner.0", ""):
            model.register_forward_hook(HookFunction(name))
        model(torch.ones(1, 2))
    assert set(records) == {"embed", "inner", "inner.0", ""}
