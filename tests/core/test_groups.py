"""Hook functions switched on and off together."""

import copy
from argparse import Namespace
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from flex_model import FlexModel, HookFunction
from flex_model.errors import GroupError, RegistrationError, UnknownModuleError

Records = dict[str, list[Tensor]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.act(layer(x))
        return x


@pytest.fixture
def records() -> Records:
    return {}


@pytest.fixture
def model(records: Records) -> Iterator[FlexModel]:
    with FlexModel(Net(), records) as made:
        yield made


@pytest.fixture
def hooks(model: FlexModel) -> list[HookFunction]:
    made = [HookFunction(f"layers.{at}") for at in range(3)]
    for hook in made:
        model.register_forward_hook(hook)
    model.update_hook_groups(made[:2], "early")
    model.update_hook_groups([made[1], made[2]], "late")
    return made


def _ran(model: FlexModel, records: Records, **which: object) -> set[str]:
    records.clear()
    model(torch.ones(2, 3), **which)
    assert all(len(tensors) == 1 for tensors in records.values())
    return set(records)


@pytest.mark.usefixtures("hooks")
@pytest.mark.parametrize(
    ("groups", "complement", "due"),
    [
        ("all", False, "012"),
        ("all", True, ""),
        ("early", False, "01"),
        ("early", True, "2"),
        ("late", False, "12"),
        (["early", "late"], False, "012"),
        (["early", "late"], True, ""),
        (("early",), False, "01"),
        ({"late"}, True, "0"),
        ([], False, ""),
        ([], True, "012"),
    ],
)
def test_which_hooks_run(
    model: FlexModel, records: Records, groups: object, complement: bool, due: str
) -> None:
    """Catches a complement taken group by group, and a group that switches off another's hooks."""
    found = _ran(model, records, groups=groups, complement=complement)
    assert found == {f"layers.{at}" for at in due}


def test_off_and_on_again(model: FlexModel, records: Records, hooks: list[HookFunction]) -> None:
    """Catches flex-model 0.1.0's groups: once off, never on again, and no restore either."""
    for _ in range(2):
        assert _ran(model, records, groups="late") == {"layers.1", "layers.2"}
        assert _ran(model, records) == {"layers.0", "layers.1", "layers.2"}
    assert model.get_group_hook_functions("all") == hooks
    model(torch.ones(2, 3), groups="late")
    model.restore()
    assert all(not layer._forward_hooks for layer in model.module.layers)


def test_after_an_error_all_hooks_are_on_again(
    model: FlexModel, records: Records, hooks: list[HookFunction]
) -> None:
    """Catches a selection that outlives a forward that failed."""
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 99), groups="late")
    with pytest.raises(GroupError):
        model(torch.ones(2, 3), groups="nowhere")
    assert _ran(model, records) == {hook.module_name for hook in hooks}


def test_a_switched_off_edit_changes_nothing(model: FlexModel) -> None:
    """Catches an edit that still runs, though its record is left out."""
    x = torch.ones(2, 3)
    plain = model(x)
    hook = HookFunction("layers.1", editing_function=lambda module, x, save_ctx, modules: x + 9)
    model.register_forward_hook(hook)
    model.update_hook_groups(hook, "steer")
    assert not torch.equal(model(x), plain)
    assert torch.equal(model(x, groups="steer", complement=True), plain)
    assert not torch.equal(model(x, groups="steer"), plain)


@pytest.mark.usefixtures("hooks")
def test_groups_beyond_the_forward_of_the_wrapper(model: FlexModel, records: Records) -> None:
    """Catches a selection that holds for ``forward`` alone, though ``generate`` is called too."""
    with model.hook_groups("early"):
        model.module(torch.ones(2, 3))
        with model.hook_groups("late"):
            model.module(torch.ones(2, 3))
        model.module(torch.ones(2, 3))
    assert {name: len(tensors) for name, tensors in records.items()} == {
        "layers.0": 2,
        "layers.1": 3,
        "layers.2": 1,
    }


def _add_nine(module: nn.Module, x: Tensor, save_ctx: Namespace, modules: nn.ModuleDict) -> Tensor:
    return x + 9


def test_a_group_is_made_from_a_part_of_the_names(model: FlexModel, records: Records) -> None:
    """Catches flex-model 0.1.0's ``create_hook_group``, which always raised."""
    model.create_hook_group("mine", "layers.", (None, 3), _add_nine, 0, "forward")
    members = model.get_group_hook_functions("mine")
    assert [hook.module_name for hook in members] == ["layers.0", "layers.1", "layers.2"]
    for hook in members:
        assert hook.expected_shape == (None, 3)
        assert hook.editing_function is _add_nine
        assert hook.unpack_idx == 0
        assert model.get_hook_function_groups(hook) == {"all", "mine"}
    assert _ran(model, records, groups="mine") == {"layers.0", "layers.1", "layers.2"}


@pytest.mark.parametrize(
    ("hook_type", "part", "names"),
    [
        ("forward", "act", ["act"]),
        ("forward_pre", "layers.1", ["layers.1"]),
        ("full_backward", "layers.2", ["layers.2"]),
        ("full_backward_pre", "layers.2", ["layers.2"]),
        ("tensor", "bias", ["layers.0.bias", "layers.1.bias", "layers.2.bias"]),
    ],
)
def test_a_group_of_every_kind_of_hook(
    model: FlexModel, records: Records, hook_type: str, part: str, names: list[str]
) -> None:
    """Catches a kind that is registered as another, or that looks among the wrong names."""
    model.create_hook_group("mine", part, hook_type=hook_type)  # type: ignore[arg-type]
    assert [hook.module_name for hook in model.get_group_hook_functions("mine")] == names
    model(torch.ones(2, 3)).sum().backward()
    assert set(records) == set(names)


def test_an_existing_group_grows(model: FlexModel, hooks: list[HookFunction]) -> None:
    """Catches members that are lost as others come."""
    model.create_hook_group("early", "act")
    names = [hook.module_name for hook in model.get_group_hook_functions("early")]
    assert names == ["layers.0", "layers.1", "act"]
    model.update_hook_groups("layers", "early")
    assert len(model.get_group_hook_functions("early")) == 4
    model.update_hook_groups(hooks[2], "early")
    assert len(model.get_group_hook_functions("early")) == 4
    model.remove_hook_groups("layers", "early")
    assert [hook.module_name for hook in model.get_group_hook_functions("early")] == ["act"]
    model.remove_hook_groups(model.get_group_hook_functions("early"), "early")
    with pytest.raises(GroupError):
        model.get_group_hook_functions("early")


def test_one_hook_leaves_a_group(model: FlexModel, hooks: list[HookFunction]) -> None:
    """Catches a hook that is taken out of its other groups too."""
    model.remove_hook_groups(hooks[1], "early")
    assert model.get_hook_function_groups(hooks[1]) == {"all", "late"}
    assert model.get_group_hook_functions("early") == [hooks[0]]
    assert model.get_group_hook_functions("all") == hooks


def test_the_sets_handed_out_are_copies(model: FlexModel, hooks: list[HookFunction]) -> None:
    """Catches a caller who changes the registry by changing what was returned."""
    model.get_hook_function_groups(hooks[0]).clear()
    model.get_group_hook_functions("all").clear()
    assert model.get_hook_function_groups(hooks[0]) == {"all", "early"}
    assert model.get_group_hook_functions("all") == hooks


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda m, h: m(torch.ones(2, 3), groups="nowhere"), GroupError, "nowhere.*early.*late"),
        (lambda m, h: m(torch.ones(2, 3), groups=["early", "x"]), GroupError, "'x'"),
        (lambda m, h: m.hook_groups("nowhere"), GroupError, "nowhere"),
        (lambda m, h: m.get_group_hook_functions("nowhere"), GroupError, "nowhere"),
        (lambda m, h: m.remove_hook_groups(h[0], "nowhere"), GroupError, "nowhere"),
        (lambda m, h: m.remove_hook_groups(h[0], "all"), GroupError, "all"),
        (lambda m, h: m.update_hook_groups(HookFunction("act"), "x"), GroupError, "registered"),
        (lambda m, h: m.update_hook_groups([3], "x"), GroupError, "int"),
        (
            lambda m, h: m.get_hook_function_groups(HookFunction("act")),
            GroupError,
            "not registered",
        ),
        (lambda m, h: m.create_hook_group("x", "lyers"), UnknownModuleError, "lyers.*layers"),
        (lambda m, h: m.create_hook_group("x", "act", hook_type="y"), RegistrationError, "'y'"),
    ],
)
def test_what_does_not_exist_is_named(
    model: FlexModel,
    hooks: list[HookFunction],
    wrong: Callable[[FlexModel, list[HookFunction]], object],
    error: type[Exception],
    message: str,
) -> None:
    """Catches a misspelt group that silently runs nothing, and a registry half changed."""
    with pytest.raises(error, match=message) as caught:
        wrong(model, hooks)
    assert isinstance(caught.value, ValueError)
    assert model.get_group_hook_functions("early") == hooks[:2]
    assert model.get_group_hook_functions("all") == hooks


def test_a_part_of_a_name_that_nothing_matches_is_refused(
    model: FlexModel, hooks: list[HookFunction]
) -> None:
    """Catches a misspelt constructor: the group would be empty, and no one told."""
    with pytest.raises((GroupError, UnknownModuleError)):
        model.update_hook_groups("lyers", "mine")
    with pytest.raises((GroupError, UnknownModuleError)):
        model.remove_hook_groups("lyers", "early")


def test_create_is_all_or_nothing(model: FlexModel) -> None:
    """Catches a refusal in the midst that leaves some hooks behind, in no group of theirs."""
    model.module.layers[1].bias.requires_grad_(False)
    with pytest.raises(RegistrationError, match=r"layers\.1\.bias"):
        model.create_hook_group("mine", "bias", hook_type="tensor")
    assert model.get_group_hook_functions("all") == []


class WithGroups(nn.Module):
    def forward(self, x: Tensor, groups: str = "own default", complement: bool = False) -> str:
        return f"{groups} {complement}"


def test_a_wrapped_models_own_keywords_reach_it() -> None:
    """Catches the wrapper's ``groups`` swallowing the model's."""
    with FlexModel(WithGroups(), {}) as model:
        x = torch.ones(1)
        assert model(x) == "own default False"
        assert model(x, groups="mine") == "mine False"
        assert model(x, groups="mine", complement=True) == "mine True"
        assert model(x, "mine", True) == "mine True"
        assert model(x, complement=True) == "own default True"
        assert model(x, "mine", complement=True) == "mine True"


def test_a_wrapped_model_that_takes_any_keyword() -> None:
    """Catches keywords lost on their way to a model that takes ``**kwargs``."""

    class Any_(nn.Module):  # noqa: N801
        def forward(self, x: Tensor, **kwargs: object) -> dict[str, object]:
            return kwargs

    with FlexModel(Any_(), {}) as model:
        assert model(torch.ones(1), other=3) == {"other": 3}
        with pytest.raises(GroupError):
            model(torch.ones(1), groups="mine")


def test_groups_that_are_switched_off_stay_off(
    model: FlexModel, hooks: list[HookFunction], records: Records
) -> None:
    """Catches a switch that ends with a call, and a hook that runs for its other group's sake."""
    model.switch_hook_groups("early", on=False)
    for _ in range(2):
        assert _ran(model, records) == {"layers.2"}
    assert _ran(model, records, groups="late") == {"layers.2"}
    model.switch_hook_groups(["late", "early"], on=False)
    model.switch_hook_groups("early", on=True)
    assert _ran(model, records) == {"layers.0"}
    other = copy.deepcopy(model)
    assert _ran(other, other.output_ptr) == _ran(model, records) == {"layers.0"}
    with pytest.raises(GroupError, match="nobody"):
        model.switch_hook_groups(["late", "nobody"], on=False)
    model.switch_hook_groups("late", on=True)
    assert len(_ran(model, records)) == 3
    assert len(hooks) == 3


def test_one_hook_function_is_taken_off(
    model: FlexModel, hooks: list[HookFunction], records: Records
) -> None:
    """Catches a hook point that goes with its first hook function, and one that stays empty."""
    second = HookFunction("layers.1")
    model.register_forward_hook(second)
    model.remove_hook(hooks[1])
    assert not model.has_hook(hooks[1])
    assert len(_ran(model, records)) == 3
    model.remove_hook(second)
    assert _ran(model, records) == {"layers.0", "layers.2"}
    assert not model.module.layers[1]._forward_hooks
    for twice in (second, HookFunction("layers.0")):
        with pytest.raises(GroupError, match="not registered"):
            model.remove_hook(twice)
    backward = HookFunction("layers.1")
    model.register_full_backward_hook(backward)
    model.remove_hook(backward)
    assert model.module.layers[1]._is_full_backward_hook is None
    model.register_forward_pre_hook(second)
    assert model.record_key(second) == "layers.1"
    assert len(_ran(model, records)) == 3
