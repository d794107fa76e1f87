"""What is refused, in which words, and that the model works as before afterwards."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import INNER, ways, whole
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import _get_current_dispatch_mode

from flex_model import FlexModel, HookFunction
from flex_model.errors import (
    ConfigurationError,
    EditError,
    FlexModelError,
    HintError,
    LayoutError,
    RankDisagreementError,
    RegistrationError,
    UnknownModuleError,
)
from flex_model.testing.ranks import run_ranks

Edit = Callable[..., Any]


def _edit(make: Callable[[Tensor], Any]) -> Edit:
    def edited(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Any:
        return make(x)

    return edited


def _small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


# -- what an edit returns ----------------------------------------------------------------------


def _returns_none(x: Tensor) -> None:
    return None


def _returns_text(x: Tensor) -> str:
    return "text"


def _returns_a_tuple(x: Tensor) -> tuple[Tensor]:
    return (x,)


def _returns_a_number(x: Tensor) -> float:
    return 1.0


def _drops_a_row(x: Tensor) -> Tensor:
    return x[1:]


def _adds_a_dim(x: Tensor) -> Tensor:
    return x[None]


def _to_double(x: Tensor) -> Tensor:
    return x.double()


def _to_integers(x: Tensor) -> Tensor:
    return x.long()


def _to_meta(x: Tensor) -> Tensor:
    return x.to("meta")


WRONG = {
    _returns_none: "None",
    _returns_text: "str",
    _returns_a_tuple: "tuple",
    _returns_a_number: "float",
    _drops_a_row: "shape",
    _adds_a_dim: "shape",
    _to_double: "float64",
    _to_integers: "int64",
    _to_meta: "meta",
}


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_result_is_named_and_the_model_works_as_before(
    kind: str, wrong: Callable[[Tensor], Any]
) -> None:
    """Catches ``'NoneType' has no attribute 'shape'``, and a wrong dtype that fails far away."""
    model = _small()
    x = torch.ones(5, 3, requires_grad=True)
    due = model(x)
    with FlexModel(model, {}) as flex:
        edit = _edit(wrong)
        getattr(flex, f"register_{kind}_hook")(HookFunction("2", editing_function=edit))
        for _ in range(2):
            with pytest.raises(EditError) as caught:
                flex(x).sum().backward()
        message = str(caught.value)
        assert WRONG[wrong] in message
        rows = "(5, 4)" if kind in ("forward_pre", "full_backward") else "(5, 2)"
        for part in ("2", kind, "edited", rows, "float32", "cpu"):
            assert part in message, message
        assert isinstance(caught.value, TypeError)
        assert isinstance(caught.value, FlexModelError)
    assert torch.equal(model(x), due)


def test_autocast_results_are_cast_back() -> None:
    """Catches a refusal of what autocast itself brought about: another float type."""
    records: dict[str, list[Tensor]] = {}
    with FlexModel(_small(), records) as model:
        probe = nn.Linear(4, 4)
        model.register_trainable_module("probe", probe)
        for make in (lambda x: x.float() * 2, lambda x: x.double(), lambda x: x.half()):
            model.register_forward_hook(HookFunction("0", editing_function=_edit(make)))
        seen: list[torch.dtype] = []
        model.module[1].register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.ones(5, 3)).sum().backward()
        assert seen == [torch.bfloat16]
        assert records["0"][0].dtype == torch.bfloat16
        with pytest.raises(EditError, match="float"):
            model(torch.ones(5, 3))
    with FlexModel(_small(), {}) as model:
        model.register_forward_hook(HookFunction("0", editing_function=_edit(_to_integers)))
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(EditError, match="int64"):
            model(torch.ones(5, 3))


def test_an_error_of_the_edits_own_passes_through() -> None:
    """Catches a user's error wrapped, or lost, on its way up."""

    def fails(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
        raise KeyError("mine")

    model = _small()
    x = torch.ones(5, 3)
    due = model(x)
    with FlexModel(model, {}) as flex:
        flex.register_forward_hook(HookFunction("0", editing_function=fails))
        with pytest.raises(KeyError, match="mine"):
            flex(x)
    assert torch.equal(model(x), due)


# -- registering -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_an_unknown_module_is_refused_with_the_nearest_names(kind: str) -> None:
    """Catches a misspelt name that would be found out at the first forward, or never."""
    with FlexModel(whole(), {}) as model:
        with pytest.raises(UnknownModuleError, match=r"0\.upp.*Nearest.*0\.up") as caught:
            getattr(model, f"register_{kind}_hook")(HookFunction("0.upp"))
        assert isinstance(caught.value, ValueError)
        assert model.get_group_hook_functions("all") == []


def test_an_unknown_parameter_is_refused_with_the_nearest_names() -> None:
    """Catches the same for parameters; a module is no parameter."""
    with FlexModel(whole(), {}) as model:
        for name in ("0.up.wieght", "0.up"):
            with pytest.raises(UnknownModuleError, match=r"0\.up\.weight"):
                model.register_hook(HookFunction(name))
        with pytest.raises(UnknownModuleError, match=r"0\.up\.weight"):
            model.get_module_parameter("0.up.wieght", (INNER, None))


def test_one_hook_function_in_two_places_is_refused() -> None:
    """Catches records of two places mixed in one list."""
    with FlexModel(_small(), {}) as model:
        hook = HookFunction("0")
        model.register_forward_hook(hook)
        for register in (model.register_forward_hook, model.register_forward_pre_hook):
            with pytest.raises(RegistrationError, match=r"'0'.*registered already"):
                register(hook)
        assert model.get_group_hook_functions("all") == [hook]


@pytest.mark.parametrize("hook", [None, "0", lambda *args: None, HookFunction])
def test_what_is_no_hook_function_is_refused(hook: Any) -> None:
    """Catches a plain function, or the class itself, handed over."""
    with FlexModel(_small(), {}) as model, pytest.raises(RegistrationError, match="HookFunction"):
        model.register_forward_hook(hook)


def test_a_parameter_that_gets_no_gradient_is_refused() -> None:
    """Catches a hook that would never run."""
    model = _small()
    model[0].bias.requires_grad_(False)
    message = r"0\.bias.*requires_grad"
    with FlexModel(model, {}) as flex, pytest.raises(RegistrationError, match=message):
        flex.register_hook(HookFunction("0.bias"))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("probe", None),
        ("probe", torch.ones(1)),
        ("probe", nn.Linear),
        ("taken", nn.Identity()),
        ("with.dot", nn.Identity()),
        ("", nn.Identity()),
        ("keys", nn.Identity()),
        (3, nn.Identity()),
    ],
)
def test_a_trainable_module_that_cannot_be_is_refused(name: Any, module: Any) -> None:
    """Catches torch's own errors about names, and a module replaced by another."""
    with FlexModel(_small(), {}) as model:
        first = nn.Identity()
        model.register_trainable_module("taken", first)
        with pytest.raises(RegistrationError):
            model.register_trainable_module(name, module)
        assert list(model.trainable_modules.values()) == [first]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((torch.ones(1), {}), {}),
        ((None, {}), {}),
        ((nn.Identity(), None), {}),
        ((nn.Identity(), []), {}),
        ((nn.Identity(), {}), {"data_parallel_loss": "max"}),
        ((nn.Identity(), {}), {"keep": "last"}),
        ((nn.Identity(), {}), {"keep": 1}),
        ((nn.Identity(), {}), {"keep": None}),
        ((nn.Identity(), {}), {"keep": True}),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Catches a mistake that would show only at the first forward."""
    with pytest.raises(ConfigurationError):
        FlexModel(*arguments, **options)


# -- ranks: alike ------------------------------------------------------------------------------


def _wrong_on_all_ranks() -> None:
    for way in ways():
        for site in ("0.norm", "0.up", "0.down"):
            model = way.model()
            x = way.leaf()
            due = model(x)
            with way.flex(model, {}) as flex:
                bad = HookFunction(site, editing_function=_edit(_returns_none))
                flex.register_forward_hook(bad)
                flex.update_hook_groups(bad, "bad")
                for call in (flex, flex.module):
                    with pytest.raises(EditError, match=f"rank {dist.get_rank()}"):
                        call(x)  # the first forward, which is watched to find the layout
                    assert _get_current_dispatch_mode() is None, "a trace is left behind"
                good = HookFunction("0.act", editing_function=_edit(lambda x: x * 1))
                flex.register_forward_hook(good)
                out = flex(x, groups="bad", complement=True)
                torch.testing.assert_close(out, due)
            assert torch.equal(model(x), due)


def test_after_an_error_on_every_rank_the_model_works_as_before() -> None:
    """Catches a trace, a depth or a half-done exchange that the next forward meets."""
    run_ranks(_wrong_on_all_ranks, 2)


def _model_fails() -> None:
    for way in ways():
        model = way.model()
        due = model(way.leaf())
        with way.flex(model, {}) as flex:
            flex.register_forward_hook(HookFunction("0.up"))
            fails = model.get_submodule("0.act").register_forward_hook(_raise)
            for call in (flex, flex.module):
                with pytest.raises(KeyError):
                    call(way.leaf())
                assert _get_current_dispatch_mode() is None
            fails.remove()
            for _ in range(2):
                torch.testing.assert_close(flex(way.leaf()), due)


def _raise(module: nn.Module, args: Any, output: Any) -> None:
    raise KeyError("from the model")


def test_after_an_error_of_the_model_itself() -> None:
    """Catches the same where nothing of the hooks was wrong."""
    run_ranks(_model_fails, 2)


def _wrong_hints() -> None:
    way = ways()[0]
    model = way.model()
    due = model(way.leaf())
    for site, hint in [
        ("0.up", (4, 5)),
        ("0.up", (4, 5, 99)),
        ("0.up", (4, 5, INNER // 2)),
        ("0.up", (8, 5, INNER)),
        ("0.norm", (4, 5, 12)),
        ("0.norm", (None, 10, None)),
        ("0.norm", (None, None, 7)),
        ("0.down", (1, None, None)),
    ]:
        for edit in (None, _edit(lambda x: x * 1)):
            with way.flex(model, {}) as flex:
                flex.register_forward_hook(HookFunction(site, hint, edit))
                with pytest.raises(HintError) as caught:
                    flex(way.leaf())
            for part in (site, f"rank {dist.get_rank()}", str(hint)):
                assert part in str(caught.value)
            assert torch.equal(model(way.leaf()), due)


def test_hints_that_do_not_fit_are_refused_by_name() -> None:
    """Catches fault 6: a replicated dim gathered to (2, 14, 8), a batch of 1, sizes of 99."""
    run_ranks(_wrong_hints, 2)


class ByHand(nn.Module):
    """A column-parallel layer that no framework knows of."""

    def __init__(self) -> None:
        super().__init__()
        full = nn.Linear(6, 8, bias=False)
        with torch.no_grad():
            full.weight.copy_(torch.arange(48.0).reshape(8, 6) / 48)
        self.whole = full.weight.detach().clone()
        self.layer = nn.Linear(6, 4, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(self.whole.chunk(2)[dist.get_rank()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _by_hand() -> None:
    x = torch.arange(12.0).reshape(2, 6)
    records: dict[str, list[Tensor]] = {}
    model = ByHand()
    with FlexModel(model, records, 2, keep="all") as flex:
        hook = HookFunction("layer", editing_function=_edit(lambda x: x.flip(-1)))
        flex.register_forward_hook(hook)
        with pytest.raises(LayoutError, match="expected_shape") as caught:
            flex(x)
        assert "layer" in str(caught.value)
    for told in ({"expected_shape": (None, 8)}, {"placements": {"tp": Shard(1)}}):
        records.clear()
        with FlexModel(model, records, 2, keep="all") as flex:
            edit = _edit(lambda x: x.flip(-1))
            flex.register_forward_hook(HookFunction("layer", editing_function=edit, **told))
            out = flex(x)
        due = x @ model.whole.T
        torch.testing.assert_close(records["layer"][0], due)
        torch.testing.assert_close(out, due.flip(-1).chunk(2, -1)[dist.get_rank()])


def test_the_way_out_that_a_message_names_is_one() -> None:
    """Catches a hint that is asked for and then refused: a layer sharded by hand, whose shards
    nothing tells of but their values.
    """
    run_ranks(_by_hand, 2)


def _cut_inputs() -> None:
    x = torch.arange(12.0).reshape(2, 6)
    part = x.chunk(2, -1)[dist.get_rank()]
    for told in ({"expected_shape": (2, 6)}, {"placements": {"tp": Shard(1)}}):
        records: dict[str, list[Tensor]] = {}
        with FlexModel(nn.Sequential(nn.Identity()), records, 2, keep="all") as flex:
            flex.register_forward_hook(HookFunction("0", **told))
            assert torch.equal(flex(part), part)
        assert torch.equal(records["0"][0], x)


def test_a_hint_for_a_model_whose_inputs_are_shards() -> None:
    """Catches inputs taken for alike on every rank against what the hint, and the values, say."""
    run_ranks(_cut_inputs, 2)


# -- ranks: not alike --------------------------------------------------------------------------


def _disagree(how: str) -> str:
    rank = dist.get_rank()
    way = {"tokens": ways()[1]}.get(how, ways()[0])
    model = way.model()
    with way.flex(model, {}) as flex:
        hooks = [HookFunction("0.up"), HookFunction("0.norm")]
        if how == "order":
            hooks = hooks[:: 1 - 2 * rank]
        if how == "number":
            hooks = hooks[: 2 - rank]
        for hook in hooks:
            flex.register_forward_hook(hook)
            flex.update_hook_groups(hook, hook.module_name)
        shape = [4, 5, 6]
        if how in ("tokens", "input"):
            shape[1] += rank
        if how == "batch":
            shape[0] += rank
        groups: Any = "all"
        if how == "groups":
            groups = ["0.up", "0.norm"][rank]
        start = time.monotonic()
        with pytest.raises(RankDisagreementError) as caught:
            flex(torch.ones(shape), groups=groups)
        assert time.monotonic() - start < 10
        return str(caught.value)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("number", ["active", "rank 0", "rank 1"]),
        ("order", ["active", "rank 0", "rank 1"]),
        ("groups", ["active", "rank 0", "rank 1"]),
        ("tokens", ["(5, 6)", "(6, 6)", "rank 1"]),
        ("input", ["(5, 6)", "(6, 6)"]),
        ("batch", ["(4, 5, 6)", "(5, 5, 6)"]),
    ],
)
def test_ranks_that_disagree_are_told_on_every_rank(how: str, words: list[str]) -> None:
    """Catches a rank that waits for ever, and shards of different things joined."""
    for message in run_ranks(partial(_disagree, how), 2, timeout=30):
        for word in words:
            assert word in message
