"""Bad and unusual inputs: each gives the right result or a named error, and leaves nothing behind.

Each row runs on one process, and on two ranks, tensor-parallel and data-parallel. Right is what
plain torch hooks make of it on one process. On every rank alike a row ends well, or with the error
it names; afterwards the model is as it was, and its output the same to the bit.
"""

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import (
    INNER,
    Ways,
    batch,
    close,
    one_process_loss,
    plain_gradients,
    ways,
    whole,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from flex_model import FlexModel, HookFunction, elementwise
from flex_model.errors import (
    ConfigurationError,
    CopyError,
    EditError,
    FlexModelError,
    HintError,
    LayoutError,
    RankDisagreementError,
    RegistrationError,
    UnknownModuleError,
)
from flex_model.testing.ranks import run_ranks

ALONE = Ways("alone")
ALL = ("alone", "tp", "dp")
RANKS = ("tp", "dp")
Function = Callable[[Tensor], Any]


# -- the stage ---------------------------------------------------------------------------------


@dataclass
class Scene:
    """A model before anything was done to it, and what a row needs to work on it."""

    way: Ways
    model: nn.Module
    records: dict[str, list[Tensor]] = field(default_factory=dict)
    made: list[FlexModel] = field(default_factory=list)

    @property
    def x(self) -> Tensor:
        """This rank's part of the batch, a new leaf."""
        return self.way.leaf()

    @property
    def flex(self) -> FlexModel:
        """The FlexModel that the row made first, or one with records on every rank."""
        return self.made[0] if self.made else self.wrap()

    def wrap(self, model: nn.Module | None = None, **options: Any) -> FlexModel:
        options = {**self.way.sizes, "keep": "all", **options}
        wrapped = self.model if model is None else model
        self.made.append(FlexModel(wrapped, options.pop("records", self.records), **options))
        return self.made[-1]

    def hook(
        self, name: str, function: Function | None = None, kind: str = "forward", **told: Any
    ) -> HookFunction:
        edit = None if function is None else edit_of(function)
        made = HookFunction(name, editing_function=edit, **told)
        register = "register_hook" if kind == "tensor" else f"register_{kind}_hook"
        getattr(self.flex, register)(made)
        return made

    def restore(self) -> None:
        for flex in reversed(self.made):
            flex.restore()

    def is_part_of(self, actual: Tensor, due: Tensor) -> None:
        """The right output of this rank, due being the whole one."""
        close(actual, self.way.part(due), "output")


def edit_of(function: Function) -> Callable[..., Any]:
    def edited(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Any:
        return function(x)

    return edited


def double(x: Tensor) -> Tensor:
    return x * 2


def truth(*edits: tuple[str, Function], model: nn.Module | None = None) -> Tensor:
    """What one process makes of the whole batch with torch's own forward hooks."""
    model = whole() if model is None else model
    for name, function in edits:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, args, out, function=function: function(out.clone()))
    return model(batch()).detach()


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a row could leave behind in the model, or in torch."""
    found: dict[str, Any] = {
        "state_dict": list(model.state_dict()),
        "dispatch mode": _get_current_dispatch_mode(),
        "DTensor": (DTensor.redistribute, DTensor.to_local),
        "autocast": torch.is_autocast_enabled("cpu"),
        "gradients on": torch.is_grad_enabled(),
        "guards": torch._dynamo.config.skip_nnmodule_hook_guards,
    }
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = dict(value) if isinstance(value, dict) else value
        found[f"{name} class"] = type(module)
    for name, tensor in model.named_parameters():
        hooks = dict(tensor._backward_hooks or {})
        found[f"{name} itself"] = (id(tensor), tensor.dtype, tensor.requires_grad, hooks)
    return found


def left_behind(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    nothing = object()
    return [
        f"{key}: {before.get(key)} became {after.get(key)}"
        for key in {**before, **after}
        if (a := before.get(key, nothing)) is not (b := after.get(key, nothing)) and a != b
    ]


@dataclass
class Row:
    """A bad or unusual input.

    Attributes:
        run: does it; checks the result where it is no error.
        error: the error that is due on every rank; None for a right result.
        words: in its text; ``{rank}`` stands for the rank's number.
        places: where it runs.
        model: what is wrapped; the ways' own small model if None.
        inputs: of that model.
    """

    run: Callable[[Scene], None]
    error: type[FlexModelError] | None = None
    words: tuple[str, ...] = ()
    places: tuple[str, ...] = ALL
    model: Callable[[], nn.Module] | None = None
    inputs: Callable[[Ways], tuple[Any, ...]] = lambda way: (way.leaf(),)


ROWS: dict[str, Row] = {}


def row(
    error: type[FlexModelError] | None = None, *words: str, **told: Any
) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    def note(run: Callable[[Scene], None]) -> Callable[[Scene], None]:
        ROWS[run.__name__] = Row(run, error, words, **told)
        return run

    return note


def rows(
    error: type[FlexModelError], inputs: dict[str, Any], *words: str, **told: Any
) -> Callable[[Callable[[Scene, Any], None]], None]:
    """One row for each of several inputs."""

    def note(run: Callable[[Scene, Any], None]) -> None:
        for name, value in inputs.items():
            ROWS[f"{run.__name__}: {name}"] = Row(
                lambda scene, value=value: run(scene, value), error, words, **told
            )

    return note


@dataclass
class Outcome:
    """How a row ended on one rank.

    Attributes:
        kind: class of the error, empty if there was none.
        message: its text.
        left: what was left behind.
    """

    kind: str = ""
    message: str = ""
    left: list[str] = field(default_factory=list)


def outcome(entry: Row, way: Ways) -> Outcome:
    model = way.model() if entry.model is None else entry.model()
    inputs = entry.inputs(way)
    model(*inputs)
    before, due = everything(model), model(*inputs).detach()
    scene, found = Scene(way, model), Outcome()
    try:
        entry.run(scene)
    except BaseException as error:  # noqa: BLE001 - to be told, whatever it is
        found = Outcome(type(error).__name__, str(error))
    scene.restore()
    model.zero_grad()
    found.left = left_behind(before, everything(model))
    try:
        if not torch.equal(model(*inputs), due):
            found.left.append("another output")
    except Exception as error:  # noqa: BLE001 - to be told, whatever it is
        found.left.append(f"no output: {error}")
    return found


def outcomes_on_ranks(place: str) -> dict[str, Outcome]:
    way = {way.name: way for way in ways()}[place]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: outcome(entry, way) for name, entry in ROWS.items() if place in entry.places}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[dict[str, Outcome]]]:
    """By place and rank; all rows of one place in one job."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = {
            name: outcome(entry, ALONE) for name, entry in ROWS.items() if "alone" in entry.places
        }
    return {
        "alone": [alone],
        **{place: run_ranks(outcomes_on_ranks, 2, place, timeout=200) for place in RANKS},
    }


# -- sizes, meshes and options -----------------------------------------------------------------


@rows(
    ConfigurationError,
    {"zero": 0, "negative": -2, "bool": True, "text": "2", "float": 2.0},
    "tp size must be a positive whole number",
)
def size(scene: Scene, value: Any) -> None:
    FlexModel(scene.model, {}, value)


@row(ConfigurationError, "tp")
def sizes_that_are_not_the_ranks(scene: Scene) -> None:
    FlexModel(scene.model, {}, tensor_parallel_size=3)


@row(ConfigurationError, "multiply to 4", "2 ranks", "Give sizes whose product", places=RANKS)
def sizes_beyond_the_ranks(scene: Scene) -> None:
    FlexModel(scene.model, {}, 2, 1, 2)


@rows(ConfigurationError, {"none": None, "unknown": ("rows",)}, "dim names", places=RANKS)
def mesh_names(scene: Scene, names: Any) -> None:
    FlexModel(scene.model, {}, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=names))


@rows(
    ConfigurationError,
    {"dp": (("dp",), (2,)), "cp": (("cp",), (2,)), "tp of one": (("tp", "dp"), (1, 2))},
    "is spread over the tensor-parallel ranks [0, 1]",
    "along tp of rank {rank}",
    "Give the mesh",
    places=("tp",),
)
def mesh_that_contradicts_the_model(scene: Scene, mesh: Any) -> None:
    FlexModel(scene.model, {}, mesh=init_device_mesh("cpu", mesh[1], mesh_dim_names=mesh[0]))


@rows(
    ConfigurationError,
    {
        "batch_dim": {"batch_dim": "0"},
        "batch_dim below 0": {"batch_dim": -1},
        "sequence_dim": {"sequence_dim": 1.0},
        "patience": {"patience": 0},
        "seed": {"seed": None},
        "mesh": {"mesh": "tp"},
        "process_group": {"process_group": "world"},
        "store": {"store": {}},
    },
    "must be",
    "got",
)
def option(scene: Scene, options: dict[str, Any]) -> None:
    FlexModel(scene.model, {}, **options)


@row(ConfigurationError, "batch_dim=9", "rank {rank}", "(2, 5, 6)", "Give the dim", places=("dp",))
def a_batch_dim_beyond_the_inputs(scene: Scene) -> None:
    scene.wrap(batch_dim=9)
    scene.hook("0.up")
    scene.flex(scene.x)


@row(ConfigurationError, "0.up", "int", "appended to a list")
def records_that_are_no_list(scene: Scene) -> None:
    scene.records["0.up"] = 3  # type: ignore[assignment]
    scene.hook("0.up")
    scene.flex(scene.x)


# -- what a hook function asks for -------------------------------------------------------------


@rows(
    HintError,
    {
        "number": 5,
        "text": "abc",
        "below 0": (4, 5, -1),
        "float": (4, 5, 8.0),
        "bool": (True, 5, 8),
        "name": ("batch", None, None),
    },
    "0.up",
    "expected_shape",
    "Give the whole tensor's",
)
def hint_that_is_none(scene: Scene, hint: Any) -> None:
    scene.hook("0.up", expected_shape=hint)


@rows(
    HintError,
    {
        "wrong dim": (8, 5, 4),
        "wrong rank": (4, 5, 8, 1),
        "no dims": (),
        "99": (None, None, 99),
        "batch of 1": (1, 5, None),
    },
    "0.up (forward, rank {rank})",
    "expected_shape",
    "the local shape",
)
def hint_that_does_not_fit(scene: Scene, hint: Any) -> None:
    scene.hook("0.up", double, expected_shape=hint)
    scene.flex(scene.x)


@row(HintError, "0.up (forward, rank {rank})", "(4, 5, 8)", "(4, 5, 16)")
def hints_that_contradict_each_other(scene: Scene) -> None:
    scene.hook("0.up", expected_shape=(4, 5, INNER))
    try:
        scene.hook("0.up", double, expected_shape=(4, 5, 16))
    finally:
        scene.is_part_of(scene.flex(scene.x), truth())  # the refused one does not run


@rows(
    HintError,
    {"unknown": {"ep": Shard(0)}, "stages": {"pp": Shard(0)}},
    "0.up (forward, rank {rank})",
    "hints name mesh dims",
    "there are dp, cp, tp",
)
def placement_over_no_mesh_dim(scene: Scene, placements: Any) -> None:
    scene.hook("0.up", placements=placements)


@rows(HintError, {"number": {"tp": 2}, "list": ["tp"]}, "0.up", "placements", "Shard(2)")
def placement_that_is_none(scene: Scene, placements: Any) -> None:
    scene.hook("0.up", placements=placements)


@rows(
    HintError,
    {option: {option: {"tp": Shard(9), "dp": Shard(9)}} for option in ("placements", "gradients")},
    "0.up (forward, rank {rank})",
    "names dim 9",
    "3 dims",
    places=RANKS,
)
def dim_beyond_the_tensor(scene: Scene, told: Any) -> None:
    scene.hook("0.up", double, **told)
    scene.flex(scene.x).sum().backward()


@row()
def placements_counted_from_the_end(scene: Scene) -> None:
    def flipped(x: Tensor) -> Tensor:
        return x.flip(0).flip(-1)

    scene.hook("0.up", flipped, placements={"tp": Shard(-1), "dp": Shard(-3)})
    scene.is_part_of(scene.flex(scene.x), truth(("0.up", flipped)))
    assert scene.records["0.up"][0].shape == (4, 5, INNER)


@rows(
    RegistrationError,
    {"number": 3, "text": "abc", "one argument": lambda x: x, "two": lambda a, b, *, c: a},
    "0.up",
    "(current_module, inputs, save_ctx, modules)",
)
def function_that_cannot_be_called(scene: Scene, function: Any) -> None:
    scene.flex.register_forward_hook(HookFunction("0.up", editing_function=function))


@rows(
    RegistrationError,
    {"text": "0", "none": None, "bool": True, "float": 1.0},
    "0.up",
    "unpack_idx must be a whole number",
)
def index_that_is_none(scene: Scene, index: Any) -> None:
    scene.hook("0.up", unpack_idx=index)


@rows(LayoutError, {"1": 1, "-2": -2}, "0.up (forward, rank {rank})", "unpack_idx", "1 tensors")
def index_beyond_the_tensors(scene: Scene, index: int) -> None:
    scene.hook("0.up", double, unpack_idx=index)
    scene.flex(scene.x)


@rows(
    UnknownModuleError,
    {"dot behind": "0.up.", "two dots": "0..up", "dot": ".", "wrapper's": "module.0.up"},
    "no module",
)
def name_of_nothing(scene: Scene, name: str) -> None:
    scene.hook(name)


@rows(RegistrationError, {"none": None, "number": 0}, "module_name must be a string", "path")
def name_that_is_none(scene: Scene, name: Any) -> None:
    scene.hook(name)


@row()
def the_root_by_its_name(scene: Scene) -> None:
    scene.hook("", double)
    scene.is_part_of(scene.flex(scene.x), truth() * 2)


# -- what an edit returns, and does ------------------------------------------------------------


def dtensor_of(x: Tensor) -> Tensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(x.detach(), mesh, [Replicate()])


@rows(
    EditError,
    {
        "reshaped": lambda x: x.flatten(),
        "double": lambda x: x.double(),
        "on meta": lambda x: x.to("meta"),
        "None": lambda x: None,
        "a tuple": lambda x: (x, x),
        "sparse": lambda x: x.to_sparse(),
    },
    "0.up (forward, rank {rank})",
    "editing function edited returned",
    "(4, 5, 8), torch.float32 on cpu was due",
    "eturn",
)
def result(scene: Scene, function: Function) -> None:
    scene.hook("0.up", function)
    scene.flex(scene.x)


@row(EditError, "0.up (forward, rank {rank})", "returned a DTensor", "full_tensor()", places=RANKS)
def a_result_that_is_a_dtensor(scene: Scene) -> None:
    scene.hook("0.up", dtensor_of)
    scene.flex(scene.x)


@rows(
    EditError,
    {"log": lambda x: x.log(), "nan": lambda x: x * float("nan")},
    "0.up (forward, rank {rank})",
    "made a NaN",
    "(4, 5, 8)",
    "debug=False",
)
def debugged(scene: Scene, function: Function) -> None:
    scene.wrap(debug=True)
    scene.hook("0.up", function)
    scene.flex(scene.x)


def _rearranged(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1) * 2


def _expanded(x: Tensor) -> Tensor:
    return x.mean((0, 1)).expand_as(x)


UNUSUAL: dict[str, Function] = {
    "not contiguous": _rearranged,
    "expanded": _expanded,
    "in place": lambda x: x.mul_(2),
    "in place on a view": lambda x: x.flatten(0, 1)[::2].zero_() is None or x,
    "a new parameter": lambda x: nn.Parameter(x.detach() * 2),
}


def _same_as_raw_hooks(scene: Scene, name: str, function: Function, kind: str) -> None:
    """Output and gradients of an edit, with a further one behind it that works in place."""
    scene.hook(name, function, kind)
    scene.hook(name, lambda x: x.mul_(1.5), kind)
    model, x_due = whole(), batch()
    module = model.get_submodule(name)
    if kind == "forward":
        module.register_forward_hook(lambda m, args, out: function(out.clone()) * 1.5)
    else:
        module.register_forward_pre_hook(lambda m, args: (function(args[0].clone()) * 1.5,))
    due, x = model(x_due), scene.x
    kept = x.detach().clone()
    one_process_loss(due, scene.way).backward()
    out = scene.flex(x)
    scene.way.loss(out).backward()
    assert torch.equal(x.detach(), kept), "the input was written to"
    scene.is_part_of(out.detach(), due.detach())
    assert x_due.grad is not None
    close(x.grad, scene.way.input_gradient(x_due.grad), "input gradient")
    found = scene.way.gradients(scene.model)
    for parameter, gradient in plain_gradients(model).items():
        close(found[parameter], gradient, parameter)


for _kind in ("forward", "forward_pre"):
    for _name, _function in UNUSUAL.items():
        ROWS[f"edit {_kind}: {_name}"] = Row(
            lambda scene, f=_function, kind=_kind: _same_as_raw_hooks(scene, "0.norm", f, kind)
        )


class Weighted(nn.Module):
    """Adds a parameter as large as the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Module()
        self.weight = nn.Parameter(torch.ones(4, 5, 6))
        self.first, self.second = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x * 2))


@row(model=Weighted)
def the_models_own_parameter_as_result(scene: Scene) -> None:
    weight = scene.model.weight
    with torch.no_grad():
        weight.fill_(-1.0)
        scene.hook("first", lambda x: weight)
        out = scene.flex(scene.x)  # what follows writes in place
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(weight, torch.full_like(weight, -1.0))
        weight.fill_(1.0)


@row()
def an_edit_that_raises_on_every_rank(scene: Scene) -> None:
    scene.hook("0.up", lambda x: x.no_such_thing)
    with pytest.raises(AttributeError, match="no_such_thing"):
        scene.flex(scene.x)
    scene.restore()
    scene.is_part_of(scene.flex(scene.x), truth())


@row()
def an_edit_that_is_interrupted(scene: Scene) -> None:
    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    hook = scene.hook("0.up", interrupted)
    scene.flex.update_hook_groups(hook, "interrupted")
    with pytest.raises(KeyboardInterrupt):
        scene.flex(scene.x)
    out = scene.flex(scene.x, groups="interrupted", complement=True)
    scene.is_part_of(out, truth())


@row()
def a_model_that_raises_between_two_hooks(scene: Scene) -> None:
    def raises(module: nn.Module, args: Any) -> None:
        raise KeyError("between")

    scene.hook("0.up", double)
    scene.hook("0.down", double)
    handle = scene.model.get_submodule("0.act").register_forward_pre_hook(raises)
    with pytest.raises(KeyError, match="between"):
        scene.flex(scene.x)
    handle.remove()
    scene.is_part_of(scene.flex(scene.x), truth(("0.up", double), ("0.down", double)))


@row()
def save_ctx_torn_apart(scene: Scene) -> None:
    def tears(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
        save_ctx.__dict__.clear()
        save_ctx.__dict__ = {"kept": x.shape}
        modules["new"] = nn.Identity()
        return modules["new"](x) * 2

    scene.flex.register_forward_hook(HookFunction("0.up", editing_function=tears))
    for _ in range(2):
        scene.is_part_of(scene.flex(scene.x), truth(("0.up", double)))
    assert scene.flex.save_ctx.kept == (4, 5, INNER)


# -- inside an edit ----------------------------------------------------------------------------


def _once(do: Callable[[], Any], function: Function = double) -> Function:
    """An edit that does something else besides, in its first call."""
    done: list[Any] = []

    def edited(x: Tensor) -> Tensor:
        if not done:
            done.append(None)
            done.append(do())
        return function(x)

    return edited


TWICE, FOUR = ("0.up", double), ("0.up", lambda x: x * 4)


def _inside(scene: Scene, do: Callable[[], Any], first: Tensor, second: Tensor) -> None:
    """What the call gives in which it is done, and the next."""
    hook = scene.hook("0.up", _once(do))
    scene.flex.update_hook_groups(hook, "mine")
    scene.is_part_of(scene.flex(scene.x), first)
    scene.is_part_of(scene.flex(scene.x), second)


@row()
def registering_inside_an_edit(scene: Scene) -> None:
    def register() -> None:
        scene.hook("0.up", double)
        scene.hook("0.act", double)  # a module that is yet to come in this forward

    _inside(scene, register, truth(TWICE, ("0.act", double)), truth(FOUR, ("0.act", double)))


@row()
def a_group_made_inside_an_edit(scene: Scene) -> None:
    def make() -> None:
        scene.flex.create_hook_group("new", "act", None, edit_of(double))
        scene.flex.remove_hook_groups("up", "mine")

    due = truth(TWICE, ("0.act", double))
    _inside(scene, make, due, due)
    assert [hook.module_name for hook in scene.flex.get_group_hook_functions("new")] == ["0.act"]


@row()
def restoring_inside_an_edit(scene: Scene) -> None:
    scene.hook("0.act", double)
    _inside(scene, scene.restore, truth(TWICE), truth())


@rows(
    None,  # type: ignore[arg-type]
    {
        "the FlexModel": lambda s: s.flex(s.x),
        "its model": lambda s: s.model(s.x),
        "a deepcopy": lambda s: s.made.append(copy.deepcopy(s.flex)),
    },
)
def called_inside_an_edit(scene: Scene, do: Callable[[Scene], Any]) -> None:
    _inside(scene, lambda: do(scene), truth(TWICE), truth(TWICE))


# -- how the model is called -------------------------------------------------------------------


@rows(None, {"no_grad": torch.no_grad, "inference": torch.inference_mode})  # type: ignore[arg-type]
def mode(scene: Scene, enter: Callable[[], Any]) -> None:
    scene.hook("0.up", lambda x: x.mul_(2))
    for kind in ("full_backward", "full_backward_pre"):
        scene.hook("0.down", double, kind)
    with enter():
        scene.is_part_of(scene.flex(scene.x), truth(TWICE))
        scene.is_part_of(scene.model(scene.x), truth(TWICE))
    assert not scene.records["0.up"][0].is_inference() or enter is torch.inference_mode


@row()
def autocast(scene: Scene) -> None:
    scene.hook("0.up", lambda x: x.float().mul(2))
    with torch.autocast("cpu", torch.bfloat16):
        due = scene.way.part(truth(TWICE))
        out = scene.flex(scene.x)
    assert scene.records["0.up"][0].dtype == torch.bfloat16
    # Row-parallel ranks round their terms before they are added up.
    torch.testing.assert_close(out, due, atol=0.1 if scene.way.name == "tp" else 0.0, rtol=0)


@row(places=("dp",))
def batches_smaller_than_the_ranks(scene: Scene) -> None:
    x, rank = batch().detach(), dist.get_rank()
    scene.hook("0.up", lambda x: x / x.norm())
    for own in ((0, 2), (2, 0), (1, 0), (1, 3)):
        start = sum(own[:rank])
        part = x[start : start + own[rank]].clone().requires_grad_()
        out = scene.flex(part)
        out.sum().backward()
        model = whole()
        model[0].up.register_forward_hook(lambda m, args, out: out / out.norm())
        due = model(x[: sum(own)]).detach()[start : start + own[rank]]
        torch.testing.assert_close(out.detach(), due)


@row(LayoutError, "0.up (forward, rank {rank})", "(0, 5, 8)", "Give expected_shape", places=("dp",))
def no_sample_on_any_rank(scene: Scene) -> None:
    scene.hook("0.up", double)
    scene.flex(torch.ones(0, 5, 6))


@row(places=("alone",))
def no_sample(scene: Scene) -> None:
    scene.hook("0.up", double)
    scene.hook("0.down", double, "full_backward")
    x = torch.ones(0, 5, 6, requires_grad=True)
    scene.flex(x).sum().backward()
    assert scene.records["0.up"][0].shape == (0, 5, INNER)


def _identity() -> nn.Module:
    return nn.Sequential(nn.Identity())


@rows(
    None,  # type: ignore[arg-type]
    {
        "complex": torch.arange(20).reshape(4, 5) * (1 + 2j),
        "conjugate": (torch.arange(20).reshape(4, 5) * (1 + 2j)).conj(),
        "integers": torch.arange(20).reshape(4, 5),
        "bool": torch.arange(20).reshape(4, 5) % 3 == 0,
        "float8": torch.arange(20.0).reshape(4, 5).to(torch.float8_e4m3fn),
        "uint16": torch.arange(20).reshape(4, 5).to(torch.uint16),
        "one dim": torch.arange(4),
        "twelve dims": torch.arange(4 * 2**11).reshape(4, *[2] * 11),
        "forty dims": torch.arange(4).reshape(4, *[1] * 39),
    },
    model=_identity,
)
def values(scene: Scene, x: Tensor) -> None:
    def flipped(t: Tensor) -> Tensor:
        return torch.stack(tuple(reversed(t.unbind())))

    scene.hook("0", flipped)
    assert torch.equal(scene.flex(scene.way.part(x)), scene.way.part(flipped(x)))
    assert torch.equal(scene.records["0"][0], x)


@row(model=_identity)
def a_number_of_no_dims(scene: Scene) -> None:
    scene.hook("0", double)
    assert scene.flex(torch.tensor(3.0)) == 6
    assert scene.records["0"][0].shape == ()


@rows(
    LayoutError,
    {"sparse": lambda x: x.to_sparse(), "csr": lambda x: x.to_sparse_csr()},
    "0 (forward, rank {rank})",
    "cannot be gathered",
    "dense",
    model=_identity,
    places=RANKS,
)
def sparse(scene: Scene, make: Function) -> None:
    scene.hook("0")
    scene.flex(make(scene.way.part(torch.eye(4))))


@row(LayoutError, "ank {rank}", "nested", "Pad", model=_identity, places=RANKS)
def nested_tensors(scene: Scene) -> None:
    scene.hook("0")
    parts = [torch.ones(2), torch.ones(3)]
    scene.flex(torch.nested.nested_tensor(parts, layout=torch.jagged))


@rows(
    None,  # type: ignore[arg-type]
    {"sparse": torch.eye(4).to_sparse(), "csr": torch.eye(4).to_sparse_csr()},
    model=_identity,
    places=("alone",),
)
def sparse_alone(scene: Scene, x: Tensor) -> None:
    scene.hook("0", lambda t: t.clone())
    assert torch.equal(scene.flex(x).to_dense(), torch.eye(4))
    assert torch.equal(scene.records["0"][0].to_dense(), torch.eye(4))


@rows(
    LayoutError,
    {"captured": None, "edited": double},
    "0 (forward, rank {rank})",
    "meta device",
    "real inputs",
    model=_identity,
)
def on_the_meta_device(scene: Scene, function: Function | None) -> None:
    scene.hook("0", function)
    scene.flex(torch.ones(4, 5, device="meta"))


# -- modules -----------------------------------------------------------------------------------


class Odd(nn.Module):
    """Modules that take or return no tensor, take keywords only, run twice, or never."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing, self.generator, self.keyword = Nothing(), Generator(), Keyword()
        self.twice, self.never = nn.Tanh(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.nothing()
        x = self.keyword(x=next(self.generator(x)))
        return self.twice(self.twice(x))


class Nothing(nn.Module):
    def forward(self) -> None:
        return None


class Generator(nn.Module):
    def forward(self, x: Tensor) -> Iterator[Tensor]:
        return iter([x])


class Keyword(nn.Module):
    def forward(self, *, x: Tensor) -> Tensor:
        return x * 3


@rows(
    LayoutError,
    {
        "forward": ("nothing", "forward"),
        "forward_pre": ("nothing", "forward_pre"),
        "full_backward": ("nothing", "full_backward"),
        "full_backward_pre": ("nothing", "full_backward_pre"),
        "a generator": ("generator", "forward"),
        "a generator's gradient": ("generator", "full_backward_pre"),
        "a keyword's gradient": ("keyword", "full_backward"),
    },
    "rank {rank})",
    "0 tensors",
    "no tensor cannot be hooked",
    model=Odd,
)
def no_tensor_there(scene: Scene, site: tuple[str, str]) -> None:
    scene.hook(site[0], double, site[1])
    scene.flex(scene.x).sum().backward()


@row(model=Odd)
def a_keyword_input(scene: Scene) -> None:
    scene.hook("keyword", double, "forward_pre")
    due = (batch() * 6).tanh().tanh()
    scene.is_part_of(scene.flex(scene.x), due)


@row(model=Odd)
def a_module_never_called(scene: Scene) -> None:
    for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
        scene.hook("never", double, kind)
    scene.hook("never.weight", double, "tensor")
    scene.is_part_of(scene.flex(scene.x), (batch() * 3).tanh().tanh())
    assert scene.records == {}


@row(model=Odd)
def a_module_called_twice(scene: Scene) -> None:
    drawn: list[Tensor] = []

    def noisy(x: Tensor) -> Tensor:
        drawn.append(torch.randn(x.shape))
        return x + drawn[-1]

    scene.hook("twice", noisy)
    out = scene.flex(scene.x)
    first = (batch() * 3).tanh()
    second = (first + drawn[0]).tanh()
    scene.is_part_of(out, second + drawn[1])
    close(scene.records["twice"][0], first.detach(), "first record")
    close(scene.records["twice"][1], second.detach(), "second record")
    assert not torch.equal(*drawn)


class Tied(nn.Module):
    """One module under two names, one parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(6, 6)
        self.two = self.one
        self.left, self.right = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.left(self.two(self.one(x))))


@row(model=Tied)
def one_module_under_two_names(scene: Scene) -> None:
    scene.hook("one", double)
    scene.hook("two", lambda x: x + 1)
    both = ("one", lambda x: x * 2 + 1)
    scene.is_part_of(scene.flex(scene.x), truth(both, model=Tied()))
    assert {name: len(kept) for name, kept in scene.records.items()} == {"one": 2, "two": 2}


@row(UnknownModuleError, "right.weight", "left.weight", model=Tied)
def the_second_name_of_a_parameter(scene: Scene) -> None:
    scene.hook("left.weight", kind="tensor")
    scene.flex(scene.x).sum().backward()
    assert scene.records["left.weight"][0].shape == (6, 6)
    scene.hook("right.weight", kind="tensor")


@row()
def a_submodule_called_past_the_model(scene: Scene) -> None:
    scene.hook("0.up", double)
    with torch.no_grad():
        scene.is_part_of(scene.model(scene.x), truth(TWICE))
        scene.is_part_of(scene.flex.module[0](scene.x), truth(TWICE))
    assert len(scene.records["0.up"]) == 2


@row(LayoutError, "0.up (forward, rank {rank})", "Give expected_shape", places=RANKS)
def a_submodule_called_before_the_model(scene: Scene) -> None:
    scene.hook("0.up", double)
    try:
        scene.flex.module[0](scene.x)
    finally:  # it does not spoil what comes after
        scene.is_part_of(scene.flex(scene.x), truth(TWICE))


@row()
def a_model_that_changes_after_it_was_wrapped(scene: Scene) -> None:
    scene.hook("0.up", double)
    scene.flex(scene.x)
    scene.model[0].later = nn.Identity()
    scene.hook("0.later")
    scene.flex.eval()
    assert not scene.model[0].training
    scene.flex.train()
    scene.model.double()
    assert scene.flex(scene.x.double()).dtype == torch.float64
    scene.model.float()
    scene.is_part_of(scene.flex(scene.x), truth(TWICE))
    assert [kept.dtype for kept in scene.records["0.up"]] == [
        torch.float32,
        torch.float64,
        torch.float32,
    ]
    del scene.model[0].later


# -- several wrappers, copies ------------------------------------------------------------------


@row()
def a_flex_model_around_a_flex_model(scene: Scene) -> None:
    inner = scene.wrap()
    outer = scene.wrap(inner)
    scene.hook("0.up", double)
    for name in ("module.0.up", "module", ""):
        outer.register_forward_hook(HookFunction(name, editing_function=edit_of(double)))
    scene.is_part_of(outer(scene.x), truth(FOUR) * 4)
    assert set(scene.records) == {"0.up", "module.0.up", "module", ""}


@row()
def two_flex_models_on_one_model(scene: Scene) -> None:
    records: dict[str, list[Tensor]] = {}
    first, second = scene.wrap(), scene.wrap(records=records)
    for flex in (first, second):
        for name, kind in (("0.up", "forward"), ("0.down", "full_backward")):
            hook = HookFunction(name, editing_function=edit_of(double))
            getattr(flex, f"register_{kind}_hook")(hook)
    for flex in (first, second):
        out = flex(scene.x)
        out.sum().backward()
        scene.is_part_of(out, truth(FOUR))
    first.restore()
    scene.is_part_of(second(scene.x), truth(TWICE))
    assert {name: len(kept) for name, kept in records.items()} == {"0.up": 3, "0.down": 2}
    assert {name: len(kept) for name, kept in scene.records.items()} == {"0.up": 2, "0.down": 2}


@rows(
    CopyError,
    {
        "pickle": lambda s: pickle.dumps(s.flex),
        "save": lambda s: torch.save(s.flex, io.BytesIO()),
        "copy": lambda s: copy.copy(s.flex),
    },
    "FlexModel",
    "state_dict()",
    "copy.deepcopy()",
)
def a_flex_model_put_away(scene: Scene, do: Callable[[Scene], Any]) -> None:
    scene.hook("0.up", double)
    do(scene)


@rows(
    CopyError,
    {
        "pickle": lambda s: pickle.dumps(s.model),
        "save": lambda s: torch.save(s.model, io.BytesIO()),
        "deepcopy": lambda s: copy.deepcopy(s.model),
    },
    "hooks are on",
    "state_dict()",
    "restore()",
)
def a_hooked_model_put_away(scene: Scene, do: Callable[[Scene], Any]) -> None:
    scene.hook("0.up", double)
    assert list(scene.model.state_dict()) == list(whole().state_dict())
    do(scene)


@row()
def a_deepcopy_of_a_flex_model(scene: Scene) -> None:
    scene.hook("0.up", double)
    other = copy.deepcopy(scene.flex)
    scene.restore()
    scene.is_part_of(other(scene.x), truth(TWICE))
    other.restore()


# -- compilers ---------------------------------------------------------------------------------


@row()
def a_model_compiled_before_it_was_wrapped(scene: Scene) -> None:
    compiled = torch.compile(scene.way.model(), backend="eager")
    compiled(scene.x)
    before = everything(compiled)
    flex = scene.wrap(compiled)
    hook = scene.hook("0.up", double)
    flex.update_hook_groups(hook, "up")
    act = ("0.act", double)
    for _ in range(2):
        scene.is_part_of(flex(scene.x), truth(TWICE))
    scene.hook("0.act", double)  # after a compiled call
    scene.is_part_of(flex(scene.x), truth(TWICE, act))
    scene.is_part_of(flex(scene.x, groups="up"), truth(TWICE))
    scene.is_part_of(flex(scene.x, groups="up", complement=True), truth(act))
    flex.create_hook_group("later", "down", None, edit_of(double), hook_type="full_backward")
    flex(scene.x).sum().backward()
    assert {name: len(kept) for name, kept in scene.records.items()} == {
        "0.up": 5,
        "0.act": 3,
        "0.down": 1,
    }
    flex.restore()
    assert left_behind(before, everything(compiled)) == []
    scene.is_part_of(compiled(scene.x), truth())


@rows(None, {"the first": 0, "the middle": 1, "the last": 2})  # type: ignore[arg-type]
def one_of_equal_layers_that_are_compiled(scene: Scene, at: int) -> None:
    compiled = torch.compile(scene.way.model(3), backend="eager")
    compiled(scene.x)
    scene.wrap(compiled)
    scene.hook(f"{at}.up", double)
    scene.hook(f"{at}.down", kind="full_backward")
    for _ in range(2):
        out = scene.flex(scene.x)
        out.sum().backward()
        scene.is_part_of(out, truth((f"{at}.up", double), model=whole(3)))
    assert {name: len(kept) for name, kept in scene.records.items()} == {
        f"{at}.up": 2,
        f"{at}.down": 2,
    }


@row()
def registering_inside_an_edit_of_a_compiled_model(scene: Scene) -> None:
    compiled = torch.compile(scene.way.model(2), backend="eager")
    compiled(scene.x)
    scene.wrap(compiled)
    scene.hook("0.up", _once(lambda: scene.hook("1.up", double)))
    scene.hook("0.down", kind="full_backward")
    due = truth(TWICE, ("1.up", double), model=whole(2))
    for _ in range(2):
        out = scene.flex(scene.x)
        scene.is_part_of(out, due)
    out.sum().backward()
    assert len(scene.records["0.down"]) == 1


@row(places=("alone",))
def hooks_in_what_others_compiled(scene: Scene) -> None:
    @torch.compile(backend="eager")
    def step(x: Tensor) -> Tensor:
        return scene.model(x) + 1

    step(scene.x)
    scene.hook("0.up", double)
    scene.is_part_of(step(scene.x), truth(TWICE) + 1)
    scene.restore()
    scene.is_part_of(step(scene.x), truth() + 1)


@row()
def a_flex_model_that_is_compiled(scene: Scene) -> None:
    hook = scene.hook("0.up", double)
    scene.flex.update_hook_groups(hook, "up")
    compiled = torch.compile(scene.flex, backend="eager")
    for _ in range(2):
        scene.is_part_of(compiled(scene.x), truth(TWICE))
    scene.is_part_of(compiled(scene.x, groups="up", complement=True), truth())
    scene.hook("0.act", double)
    scene.is_part_of(compiled(scene.x), truth(TWICE, ("0.act", double)))


@rows(
    RegistrationError,
    {
        "script": torch.jit.script,
        "trace": lambda m: torch.jit.trace(m, batch().detach()),
    },
    "0.up",
    "rank 0",
    "TorchScript",
    "Wrap the model that was given",
    places=("alone",),
)
def torchscript(scene: Scene, make: Callable[[nn.Module], nn.Module]) -> None:
    scene.wrap(make(whole()))
    scene.hook("0.up", double)


@row(CopyError, "torch.export", "restore()", places=("alone",))
def exporting(scene: Scene) -> None:
    scene.hook("0.up", double)
    torch.export.export(scene.flex, (scene.x.detach(),))


# -- autograd ----------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


def _scaled(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x * modules["gain"].weight[0, 0]


def _noisy(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x * modules["gain"].weight[0, 0] + torch.randn_like(x)


@elementwise
def _scaled_shard(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return _scaled(module, x, save_ctx, modules)


@elementwise
def _noisy_shard(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return _noisy(module, x, save_ctx, modules)


EDITS = {
    "scaled": _scaled,
    "noisy": _noisy,
    "scaled on its shard": _scaled_shard,
    "noisy on its shard": _noisy_shard,
}


def _step(
    scene: Scene, model: nn.Module, name: str, edit: Any, **sizes: int
) -> tuple[Tensor, Tensor, Tensor, dict[str, int]]:
    """Output, gradients of input and trainable module, and how many records there are."""
    gain, x, records = nn.Linear(1, 1, bias=False), scene.x, {}
    with torch.no_grad():
        gain.weight.fill_(1.5)
    with FlexModel(model, records, **scene.way.sizes, keep="all") as flex:
        flex.register_trainable_module("gain", gain)
        flex.register_forward_hook(HookFunction(f"{name}0.up", editing_function=edit, record=True))
        flex.register_full_backward_hook(HookFunction(f"{name}0.down"))
        out = flex(x)
        scene.way.loss(out).backward()
    model.zero_grad()
    assert x.grad is not None
    assert gain.weight.grad is not None
    counts = {key.removeprefix(name): len(kept) for key, kept in records.items()}
    return out.detach(), x.grad, gain.weight.grad, counts


@rows(
    None,  # type: ignore[arg-type]
    {
        f"{'re' if reentrant else 'not re'}entrant, {name}": (reentrant, edit)
        for reentrant in (True, False)
        for name, edit in EDITS.items()
    },
)
def checkpointed(scene: Scene, how: tuple[bool, Any]) -> None:
    reentrant, edit = how
    # The stream of an edit is named by its module, so the same names are due.
    plain = _step(scene, Named(scene.model), "model.", edit)
    found = _step(scene, Checkpointed(scene.model, reentrant), "model.", edit)
    for actual, due in zip(found[:3], plain[:3], strict=True):
        close(actual, due, "of a checkpointed model")
    assert found[3] == plain[3] == {"0.up": 1, "0.down": 1}


class Named(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


# DTensor's own second derivatives of a row-parallel layer are wrong, with hooks or without.
@row(places=("alone", "dp"))
def double_backward(scene: Scene) -> None:
    def second(model: nn.Module, x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    model = whole()
    model[0].up.register_forward_hook(lambda m, args, out: out.sin())
    model[0].down.register_full_backward_hook(lambda m, inputs, outputs: (inputs[0] * 2,))
    scene.hook("0.up", torch.sin)
    scene.hook("0.down", double, "full_backward")
    due = second(model, batch())
    scene.is_part_of(second(scene.flex, scene.x), due)


@row()
def backward_twice(scene: Scene) -> None:
    for name, kind in (("0.up", "full_backward"), ("0.norm.weight", "tensor")):
        scene.hook(name, double, kind)
    x = scene.x
    loss = scene.flex(x).sum()
    loss.backward(retain_graph=True)
    assert x.grad is not None
    once = x.grad.clone()
    loss.backward()
    close(x.grad, once * 2, "gradient of two backwards")
    assert {name: len(kept) for name, kept in scene.records.items()} == {
        "0.up": 2,
        "0.norm.weight": 2,
    }


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "grad": lambda model, x: torch.func.grad(lambda t: model(t).sum())(x),
    "vmap": lambda model, x: torch.func.vmap(model, randomness="same")(x),
    "vmap of another dim": lambda model, x: torch.func.vmap(model, in_dims=1, randomness="same")(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,))[1],
}


@rows(None, TRANSFORMS, places=("alone",))  # type: ignore[arg-type]
def transformed(scene: Scene, transform: Callable[[nn.Module, Tensor], Tensor]) -> None:
    scene.hook("0.up", lambda x: x.sin() + 0 * torch.rand(()))
    model = whole()
    model[0].up.register_forward_hook(lambda m, args, out: out.sin())
    out = transform(scene.flex, batch().detach())
    close(out, transform(model, batch().detach()), "transform")
    record = scene.records["0.up"][0]
    assert not torch._C._functorch.is_functorch_wrapped_tensor(record)
    assert record.shape in ((4, 5, INNER), (5, 4, INNER))  # a vmapped dim comes first


@rows(
    LayoutError,
    {name: TRANSFORMS[name] for name in ("grad", "vmap", "jvp")},
    "Rank {rank}",
    "torch.func",
    "Take gradients by torch.autograd",
    places=RANKS,
)
def transformed_over_ranks(scene: Scene, transform: Callable[[nn.Module, Tensor], Tensor]) -> None:
    scene.hook("0.up", double)
    transform(scene.flex, scene.x.detach())


# -- threads -----------------------------------------------------------------------------------


@row(places=("alone",))
def threads_at_once(scene: Scene) -> None:
    drawn = [torch.zeros(1)]

    def noisy(x: Tensor) -> Tensor:
        drawn[0] = torch.randn_like(x)
        return x * 2 + drawn[0] * 0

    scene.flex.update_hook_groups(scene.hook("0.up", noisy), "noisy")
    x = batch().detach()
    wrong, due = [], {False: truth(TWICE), True: truth()}
    before = torch.get_rng_state()

    def calls(complement: bool) -> None:
        for _ in range(40):
            out = scene.flex(x, groups="noisy", complement=complement)
            if not torch.allclose(out, due[complement]):
                wrong.append(complement)

    workers = [threading.Thread(target=calls, args=(at % 2 == 0,)) for at in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert wrong == []
    assert len(scene.records["0.up"]) == 80
    assert torch.equal(torch.get_rng_state(), before), "the model's own random stream moved"


@row(RankDisagreementError, "Rank {rank}", "second thread", "Call it from one", places=RANKS)
def a_thread_that_calls_while_another_does(scene: Scene) -> None:
    raised: list[Exception] = []

    def calls() -> None:
        try:
            scene.flex(scene.x)
        except FlexModelError as error:
            raised.append(error)

    def starts() -> None:
        worker = threading.Thread(target=calls, daemon=True)
        worker.start()
        worker.join(20)

    _inside(scene, starts, truth(TWICE), truth(TWICE))
    raise raised[0]


# -- the test ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_right_or_named_and_nothing_left_behind(
    name: str, outcomes: dict[str, list[dict[str, Outcome]]]
) -> None:
    """Catches a wrong result that nobody is told of, an error of torch's insides, one rank that
    fails alone, and a hook, a mode or a changed value that outlives the FlexModel.
    """
    entry = ROWS[name]
    for place in entry.places:
        for rank, ranks_outcomes in enumerate(outcomes[place]):
            found = ranks_outcomes[name]
            where = f"{place}, rank {rank}: {found.kind}: {found.message}"
            assert found.kind == (entry.error.__name__ if entry.error else ""), where
            for word in entry.words:
                assert word.replace("{rank}", str(rank)) in found.message, where
            assert found.left == [], f"{place}, rank {rank}"
