"""Hooks over the stages of a pipeline equal one process that runs the microbatches in turn."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import close
from small_pipeline import (
    CASTS,
    MICROBATCHES,
    SAMPLES,
    TOKENS,
    WIDTH,
    Hook,
    Net,
    Truth,
    data,
    loss,
    probe,
    run,
    schedule,
    step,
    wrapped,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble
from torch.nn.parallel import DistributedDataParallel

from flex_model import FlexModel, HookFunction
from flex_model.errors import (
    ConfigurationError,
    EditError,
    RankDisagreementError,
    RegistrationError,
    UnknownModuleError,
)
from flex_model.testing.ranks import RankFailure, run_ranks
from frameworks.values import value_of

# The promise; a rank that fails first waits half of it for others that may fail alike.
SECONDS = 10.0


def _same(found: Sequence[Tensor], due: Sequence[Tensor], what: str) -> None:
    assert len(found) == len(due), f"{what}: {len(found)} of {len(due)}"
    for number, (a, b) in enumerate(zip(found, due, strict=True)):
        assert a.dtype == b.dtype, what
        close(a.double(), b.double(), f"{what}, call {number}")


def _same_gradients(found: nn.Module, due: nn.Module, what: str) -> None:
    for (name, a), (_, b) in zip(found.named_parameters(), due.named_parameters(), strict=True):
        close(a.grad, b.grad, f"{what}, {name}")


def _equal_on_all_ranks(values: dict[str, Any], what: str) -> None:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(sorted(values.items())))
    flat = [torch.utils._pytree.tree_leaves(own) for own in everyone]
    for other in flat[1:]:
        for a, b in zip(flat[0], other, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, what


def _mixing(module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x * (1 + torch.softmax(x, -1)) + 0.5 * x.roll(1, 0)


# -- records -----------------------------------------------------------------------------------

EVERY_KIND: tuple[Hook, ...] = (
    ("embed", "forward", _mixing),
    ("layers.0", "full_backward_pre", None),
    ("layers.1", "forward", None),
    ("layers.1.up", "full_backward", _mixing),
    ("layers.2", "forward_pre", None),
    ("layers.2.down", "full_backward", None),
    ("layers.3", "forward", _mixing),
    ("layers.3.up", "forward_pre", _mixing),
    ("head", "full_backward_pre", None),
    *((f"layers.{layer}.casts.{name}", "forward", None) for layer in (1, 2) for name in CASTS),
)


@pytest.mark.parametrize("keep", ["first", 1, "all"])
@pytest.mark.parametrize("kind", [ScheduleGPipe, Schedule1F1B])
def test_records_are_those_of_one_process(keep: Any, kind: Any) -> None:
    """Catches records of another stage, rank, dtype, order or microbatch, and of made-up inputs."""
    run_ranks(_records, 2, keep, kind)


def _records(keep: Any, kind: Any) -> None:
    truth = Truth(EVERY_KIND)
    with wrapped(EVERY_KIND, keep=keep) as flex:
        running = schedule(flex, kind)
        for seed, backward, new in (
            (1, True, False),
            (2, False, False),
            (3, True, False),
            (4, True, True),
        ):
            running = schedule(flex, kind) if new else running
            truth.step(seed, backward)
            with flex.step():
                output = run(running, seed, backward=backward)
            if output is not None:
                _same(output.chunk(MICROBATCHES), truth.outputs[-MICROBATCHES:], "outputs")
        kept = keep == "all" or dist.get_rank() == (0 if keep == "first" else keep)
        due = {name: tensors for (name, _), tensors in truth.records.items()}
        assert flex.output_ptr.keys() == (due.keys() if kept else set())
        for name, tensors in flex.output_ptr.items():
            _same(tensors, due[name], name)


def test_a_module_on_every_stage_is_recorded_once() -> None:
    """Catches a record per stage of one value."""
    run_ranks(_recorded_once, 2)


def _recorded_once() -> None:
    with wrapped([("scale", "forward", None)], keep="all") as flex:
        step(flex)
        # Once per microbatch: each layer stack makes it once.
        _same(flex.output_ptr["scale"], [1 + torch.arange(WIDTH) / 10] * MICROBATCHES, "scale")


# -- what editing functions store --------------------------------------------------------------


def _writes(module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    x, given = x.detach(), x
    save_ctx.norm = x.norm(dim=-1)
    save_ctx.kinds = {
        n: [(3 * x[0, 0]).to(d), {"deep": (x[0, 0] > 0, n)}] for n, d in CASTS.items()
    }
    save_ctx.numbers = (int(x.sum() * 1000), float(x.sum()), None, "text", True, 2j, b"bytes")
    save_ctx.view = x[:, :1]
    return given * 2


def _reads(module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    total = sum(values[0].double().sum() for values in save_ctx.kinds.values())
    assert save_ctx.kinds["bool"][1]["deep"][1] == "bool"
    save_ctx.last = x * 2
    return x * (1 + save_ctx.norm[..., None]) + total + save_ctx.numbers[1] + save_ctx.view


def test_later_stages_read_what_earlier_ones_stored_in_the_same_microbatch() -> None:
    """Catches values of another microbatch, lost dtypes, and values that stay on their stage."""
    run_ranks(_passed_on, 2, ScheduleGPipe)
    run_ranks(_passed_on, 2, Schedule1F1B)


def _passed_on(kind: Any) -> None:
    hooks: list[Hook] = [("layers.0", "forward", _writes), ("layers.3", "forward", _reads)]
    truth = Truth(hooks)
    with wrapped(hooks) as flex:
        for seed in (1, 2):
            output = step(flex, seed, kind)
            truth.step(seed)
            if output is not None:
                _same(output.chunk(MICROBATCHES), truth.outputs[-MICROBATCHES:], "outputs")
            if seed == 1:
                for name, parameter in flex.module.named_parameters():
                    close(parameter.grad, truth.model.get_parameter(name).grad, name)
            found, due = vars(flex.save_ctx), vars(truth.save_ctx)
            assert found.keys() == due.keys()
            for a, b in zip(*map(torch.utils._pytree.tree_leaves, (found, due)), strict=True):
                assert type(a) is type(b)
                if isinstance(a, Tensor):
                    _same([a], [b.detach()], "a stored value")
                    assert not a.requires_grad
                elif isinstance(a, float | int):
                    assert a == pytest.approx(b, rel=1e-4)
                else:
                    assert a == b
            _equal_on_all_ranks(found, "save_ctx")


def _stores_graph(module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    save_ctx.early = {"inside": [x * 2]}
    return x


def _uses(grad: bool, module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    (early,) = save_ctx.early["inside"]
    early += 1
    return x + (early if grad else early.detach())


def test_a_gradient_through_a_stored_value_is_refused(tmp_path: Path) -> None:
    """Catches weights whose gradients silently lack what flows through `save_ctx`."""
    hooks: list[Hook] = [("layers.0", "forward", _stores_graph)]
    run_ranks(_without_gradient, 2, [*hooks, ("layers.3", "forward", partial(_uses, False))])
    hooks.append(("layers.3", "forward", partial(_uses, True)))
    for told in _endings(tmp_path, 2, _failing_step, *hooks):
        assert "EditError" in told.text
        assert "flows back into save_ctx.early" in told.text


def _without_gradient(hooks: Sequence[Hook]) -> None:
    truth = Truth(hooks).step()
    with wrapped(hooks) as flex:
        step(flex)
        for name, parameter in flex.module.named_parameters():
            close(parameter.grad, truth.model.get_parameter(name).grad, name)


def _appends(name: str, module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    save_ctx.sums.append(float(x.sum()))
    save_ctx.by_name.setdefault(name, []).append(x.norm())
    if name == "0":
        save_ctx.own = getattr(save_ctx, "own", 0) + 1
        save_ctx.in_place += x.detach().sum()
    return x


def test_lists_that_stages_append_to_hold_every_entry_in_the_order_of_one_process() -> None:
    """Catches entries lost where a stage takes over the list of the one before it."""
    run_ranks(_collected, 2)


def _collected() -> None:
    hooks: list[Hook] = [
        (f"layers.{n}", "forward", partial(_appends, str(n))) for n in (0, 1, 2, 3)
    ]
    truth = Truth(hooks)
    with wrapped(hooks) as flex:
        held: list[float] = []
        for save_ctx, sums in ((flex.save_ctx, held), (truth.save_ctx, [])):
            save_ctx.sums, save_ctx.by_name, save_ctx.in_place = sums, {}, torch.zeros(())
        for seed in (1, 2):
            truth.step(seed)
            step(flex, seed)
        assert flex.save_ctx.sums == pytest.approx(truth.save_ctx.sums, rel=1e-4)
        assert held is flex.save_ctx.sums
        assert len(held) == 2 * 4 * MICROBATCHES
        assert flex.save_ctx.own == truth.save_ctx.own == 2 * MICROBATCHES
        close(flex.save_ctx.in_place, truth.save_ctx.in_place, "added to in place")
        assert flex.save_ctx.by_name.keys() == truth.save_ctx.by_name.keys()
        for name, norms in truth.save_ctx.by_name.items():
            _same(flex.save_ctx.by_name[name], [n.detach() for n in norms], name)
        _equal_on_all_ranks(vars(flex.save_ctx), "save_ctx")


def _keep_value(module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    save_ctx.value, save_ctx.deep = x.detach().clone(), {"value": x.detach() * 2}
    return x


def _attribute(name: str, module: Any, gradient: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    given = save_ctx.value + save_ctx.deep["value"]
    vars(save_ctx).setdefault(name, []).append(float((gradient * given).sum()))
    setattr(save_ctx, f"{name}_last", gradient.norm())
    return gradient * (1 + given.abs())


@pytest.mark.parametrize("kind", [ScheduleGPipe, Schedule1F1B])
def test_a_backward_hook_reads_what_the_forward_of_its_own_microbatch_stored(kind: Any) -> None:
    """Catches values of the microbatches that are under way besides, and of what it stores itself
    a loss on the way to the other stages.
    """
    run_ranks(_attributed, 2, kind)


def _attributed(kind: Any) -> None:
    hooks: list[Hook] = [
        ("layers.0", "forward", _keep_value),
        ("layers.0", "full_backward_pre", partial(_attribute, "first")),
        ("layers.2", "full_backward_pre", partial(_attribute, "second")),
    ]
    truth = Truth(hooks)
    with wrapped(hooks) as flex:
        for seed in (1, 2):
            truth.step(seed)
            step(flex, seed, kind)
        for name in ("first", "second"):
            found, due = getattr(flex.save_ctx, name), getattr(truth.save_ctx, name)
            assert found == pytest.approx(due, rel=1e-4)
            last = f"{name}_last"
            close(getattr(flex.save_ctx, last), getattr(truth.save_ctx, last), last)
        close(flex.save_ctx.value, truth.save_ctx.value, "the value of the last microbatch")
        _equal_on_all_ranks(vars(flex.save_ctx), "save_ctx")


def _adds(module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    save_ctx.total = getattr(save_ctx, "total", 0.0) + float(x.sum())
    return x


def _reads_last(module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    save_ctx.was_there = hasattr(save_ctx, "last")
    return x


def _stores_last(module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    save_ctx.last = x.norm()
    return x


@pytest.mark.parametrize(
    ("hooks", "name"),
    [
        ([("layers.0", "forward", _adds), ("layers.3", "forward", _adds)], "save_ctx.total"),
        (
            [("layers.0", "full_backward_pre", _adds), ("layers.3", "full_backward_pre", _adds)],
            "total",
        ),
        ([("layers.0", "forward", _reads_last), ("layers.3", "forward", _stores_last)], "last"),
        (
            [("layers.3", "forward", _reads_last), ("layers.0", "full_backward_pre", _stores_last)],
            "last",
        ),
    ],
    ids=["a sum", "a sum in backward", "a later stage's", "of backward"],
)
def test_what_a_stage_would_read_too_early_is_refused(hooks: Any, name: str) -> None:
    """Catches a total that silently misses what another stage added, or a value of the last step.
    The job goes on.
    """
    run_ranks(_too_early, 2, hooks, name)


def _too_early(hooks: Sequence[Hook], name: str) -> None:
    with wrapped([*hooks, ("head", "forward", None)], keep="all") as flex:
        with pytest.raises(EditError, match=name):
            step(flex)
        with _only(flex, "head"):
            step(flex)
        assert len(flex.output_ptr["head"]) == 2 * MICROBATCHES


def _only(flex: FlexModel, name: str) -> Any:
    flex.update_hook_groups(name, "only")
    return flex.hook_groups("only")


def _stores(
    where: Callable[[], Any], module: Any, x: Tensor, save_ctx: Any, modules: Any
) -> Tensor:
    save_ctx.mine = {"inside": [where()]}
    return x


def _a_lambda() -> Any:
    return lambda: None


def _a_module() -> Any:
    return nn.Linear(1, 1)


def _a_numpy_number() -> Any:
    return torch.ones(1, dtype=torch.float64).numpy()[0]


@pytest.mark.parametrize(
    ("what", "at", "kind"),
    [
        (_a_lambda, "layers.0", "forward"),
        (_a_module, "layers.3", "forward"),
        (_a_numpy_number, "layers.0", "full_backward_pre"),
        (_a_lambda, "layers.3", "full_backward_pre"),
    ],
)
def test_what_cannot_travel_is_named_on_every_rank(
    what: Any, at: str, kind: str, tmp_path: Path
) -> None:
    """Catches a rank that waits for a value that will not come, or unpickles code."""
    hook: Hook = (at, kind, partial(_stores, what))
    for told in _endings(tmp_path, 2, _failing_step, hook):
        assert told.seconds < SECONDS
        assert "EditError" in told.text
        assert "save_ctx.mine['inside'][0]" in told.text


@dataclass
class Told:
    """How a rank's step ended: by which error, after how many seconds."""

    text: str
    seconds: float


def _endings(folder: Path, size: int, body: Callable[..., None], *args: Any) -> list[Told]:
    """What each rank of a job tells that ends as programs do, by an error that nobody catches."""
    with pytest.raises(RankFailure):
        run_ranks(_ended, size, folder, body, *args)
    return [Told(**json.loads((folder / f"{rank}").read_text())) for rank in range(size)]


def _ended(folder: Path, body: Callable[..., None], *args: Any) -> None:
    start = time.monotonic()
    try:
        body(*args)
    except Exception as error:  # noqa: BLE001 - which one is for the test to judge
        told = Told(f"{type(error).__name__}: {error}", time.monotonic() - start)
        (folder / f"{os.environ['RANK']}").write_text(json.dumps(vars(told)))
        os._exit(1)  # its connections close, as those of any program


def _failing_step(*hooks: Hook) -> None:
    step(wrapped(hooks))


def test_a_view_travels_without_what_it_looks_at() -> None:
    """Catches a whole activation sent for the sake of one entry."""
    run_ranks(_compact, 2)


def _compact() -> None:
    def edit(module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
        save_ctx.one = x[0, 0, :1]
        return x

    with wrapped([("layers.0", "forward", edit)]) as flex:
        step(flex)
        assert flex.save_ctx.one.untyped_storage().nbytes() == 4


# -- calls that only find out shapes -----------------------------------------------------------


def _counts(module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    save_ctx.calls = getattr(save_ctx, "calls", 0) + 1
    return x + 0.1 * torch.randn_like(x) * torch.rand(())


def _noise(module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x + torch.randn_like(x)


@dataclass
class Drawn:
    """What a FlexModel of one process makes of random edits: only it draws what ranks should."""

    outputs: list[Tensor]
    records: dict[str, list[Tensor]]
    grads: dict[str, Tensor]
    calls: int


def _drawn(hooks: Sequence[Hook], seeds: Sequence[int]) -> Drawn:
    """The steps of these seeds in one process."""
    model, outputs = Net(), []
    with FlexModel(model, {}, seed=3) as flex:
        for name, kind, edit in hooks:
            getattr(flex, f"register_{kind}_hook")(HookFunction(name, editing_function=edit))
        for seed in seeds:
            for x, weights in zip(*(t.chunk(MICROBATCHES) for t in data(seed)), strict=True):
                outputs.append(flex(x))
                (loss(outputs[-1], weights) / MICROBATCHES).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    calls = getattr(flex.save_ctx, "calls", 0)
    return Drawn([out.detach() for out in outputs], flex.output_ptr, grads, calls)


COUNTED: tuple[Hook, ...] = (
    ("layers.1", "forward", _counts),
    ("layers.2", "forward_pre", _noise),
)


def test_finding_out_shapes_leaves_draws_and_counts_alone() -> None:
    """Catches an edit that runs on made-up inputs: its noise is then the next call's."""
    run_ranks(_found_out, 2, _drawn(COUNTED, (1, 2, 3)))


def _found_out(due: Drawn) -> None:
    with wrapped(COUNTED, seed=3, keep="all") as flex:
        running, outputs = schedule(flex), []
        for seed, backward, new in ((1, True, False), (2, False, False), (3, True, True)):
            running = schedule(flex) if new else running
            before = torch.get_rng_state()
            with flex.step():
                output = run(running, seed, backward=backward)
            assert torch.equal(torch.get_rng_state(), before)
            outputs += [] if output is None else output.chunk(MICROBATCHES)
        if outputs or dist.get_rank() == 1:
            _same(outputs, due.outputs, "outputs")
        assert flex.save_ctx.calls == due.calls == 3 * MICROBATCHES
        for name in ("layers.1", "layers.2"):
            _same(flex.output_ptr[name], due.records[name], name)


NOISY: tuple[Hook, ...] = (
    ("layers.0.up", "forward", _noise),
    ("layers.3.up", "forward", _noise),
    ("layers.2.down", "forward_pre", _noise),
)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_in_a_stage_draws_the_same_noise_again(reentrant: bool) -> None:
    """Catches other noise in the recompute, which runs between forwards of other microbatches."""
    run_ranks(_checkpointed, 2, reentrant, _drawn(NOISY, (1, 2)))


def _checkpointed(reentrant: bool, due: Drawn) -> None:
    model = Net(dist.get_rank(), reentrant=reentrant)
    with wrapped(NOISY, model=model, seed=3, keep="all") as flex:
        # Torch finds out shapes by calls that reentrant checkpointing refuses.
        running = schedule(flex, told=reentrant, scale_grads=False)
        running._loss_fn = lambda out, weights: loss(out, weights) / MICROBATCHES
        for seed in (1, 2):
            with flex.step():
                run(running, seed)
        for name, parameter in model.named_parameters():
            close(parameter.grad, due.grads[name], name)
        for name, records in due.records.items():
            _same(flex.output_ptr[name], records, name)


# -- trainable modules -------------------------------------------------------------------------


def _probing(module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x + torch.tanh(modules["probe"](x)) * x.mean()


BOTH_STAGES: tuple[Hook, ...] = (
    ("layers.0", "forward", _probing),
    ("layers.1.up", "forward_pre", _probing),
    ("layers.3", "forward", _probing),
)


@pytest.mark.parametrize("hooks", [BOTH_STAGES, BOTH_STAGES[:1], BOTH_STAGES[2:]])
@pytest.mark.parametrize("frozen", [False, True])
def test_trainable_modules_get_the_gradients_of_one_process(
    hooks: Sequence[Hook], frozen: bool
) -> None:
    """Catches the terms of another stage lost, or counted twice when gradients accumulate, and a
    frozen stage that passes no gradient on for want of one in the call that finds out shapes.
    """
    run_ranks(_trained, 2, hooks, frozen)


def _trained(hooks: Sequence[Hook], frozen: bool) -> None:
    truth = Truth(hooks, {"probe": probe()})
    model, trainable = Net(dist.get_rank()), probe()
    for net in (truth.model, model):
        net.requires_grad_(not frozen)
    for module in (trainable, truth.modules["probe"]):
        module.weight.grad = value_of("an earlier gradient", (WIDTH, WIDTH))
    with wrapped(hooks, {"probe": trainable}, model) as flex:
        for seed, kind in ((1, Schedule1F1B), (2, ScheduleGPipe)):
            held = trainable.weight.grad
            step(flex, seed, kind)
            truth.step(seed)
            assert trainable.weight.grad is held
            _same_gradients(trainable, truth.modules["probe"], "probe")
            _equal_on_all_ranks({n: p.grad for n, p in trainable.named_parameters()}, "probe")
        assert all(p.grad is None for p in model.parameters()) is frozen
        flex.zero_grad()
        step(flex, 1)
        for name, parameter in model.named_parameters():
            if not frozen:
                fresh = Truth(hooks, {"probe": probe()}).step(1).model
                close(parameter.grad, fresh.get_parameter(name).grad, name)
                break


def test_a_frozen_stage_whose_edits_train_nothing() -> None:
    """Catches a gradient that a stage announces and cannot give, or gets and cannot use."""
    hooks: list[Hook] = [("layers.0", "forward", _mixing), ("layers.3", "forward", _probing)]
    run_ranks(_trained, 2, hooks, True)


def test_statistics_that_a_trainable_module_keeps_are_on_every_stage() -> None:
    """Catches running means that only the stage has whose edit made them."""
    run_ranks(_kept, 2)


def _normed(module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return modules["norm"](x.flatten(0, 1)).view_as(x)


def _kept() -> None:
    hooks: list[Hook] = [("layers.3", "forward", _normed)]
    truth = Truth(hooks, {"norm": nn.BatchNorm1d(WIDTH)})
    with wrapped(hooks, {"norm": nn.BatchNorm1d(WIDTH)}) as flex:
        for seed in (1, 2):
            step(flex, seed)
            truth.step(seed)
        found = dict(flex.trainable_modules["norm"].named_buffers())
        for name, due in truth.modules["norm"].named_buffers():
            close(found[name].double(), due.double(), name)
        _equal_on_all_ranks(found, "buffers")
        flex.register_forward_hook(HookFunction("layers.0", editing_function=_normed))
        with pytest.raises(EditError, match=r"norm\.running_mean.*stages \[0, 1\]"):
            step(flex)


# -- names -------------------------------------------------------------------------------------


def test_names_of_every_stage() -> None:
    """Catches names that one stage knows and another does not, and cut modules that pass."""
    run_ranks(_named, 2)


def _named() -> None:
    truth, model = Net(), Net(dist.get_rank())
    with wrapped(model=model, keep="all") as flex:
        for name in ("layers", ""):
            with pytest.raises(RegistrationError, match=r"cut between pipeline stages \[0, 1\]"):
                flex.register_forward_hook(HookFunction(name))
        with pytest.raises(UnknownModuleError, match=r"Nearest: layers\.3"):
            flex.register_forward_hook(HookFunction("layer.3"))
        with pytest.raises(UnknownModuleError, match="Nearest: embed"):
            flex.register_forward_hook(HookFunction("embedd"))
        with pytest.raises(UnknownModuleError, match=r"parameter 'layers\.9\.up\.weight'"):
            flex.get_module_parameter("layers.9.up.weight")
        for name in ("embed.weight", "layers.0.up.bias", "layers.3.down.weight", "head.bias"):
            assert torch.equal(flex.get_module_parameter(name), truth.get_parameter(name))
        flex.register_hook(HookFunction("layers.0.up.weight"))
        flex.register_hook(HookFunction("head.weight"))
        with pytest.raises(RegistrationError, match="cut"):
            flex.create_hook_group("all layers", "layers")
        assert len(flex.get_group_hook_functions("all")) == 2
        flex.create_hook_group("ups", ".up")
        names = [hook.module_name for hook in flex.get_group_hook_functions("ups")]
        assert names == [f"layers.{layer}.up" for layer in range(4)]
        _groups(flex)


def _groups(flex: FlexModel) -> None:
    """Groups are switched step by step; those of another stage too."""
    ups = [(f"layers.{layer}.up", "forward", None) for layer in range(4)]
    truth = Truth(ups).step(1)
    with flex.hook_groups("ups"):
        step(flex, 1)
    with flex.hook_groups("ups", complement=True):
        step(flex, 2)
    for (name, _), due in truth.records.items():
        _same(flex.output_ptr[name], due, name)
    assert len(flex.output_ptr["head.weight"]) == MICROBATCHES
    assert len(flex.output_ptr["layers.0.up.weight"]) == MICROBATCHES


class Renumbered(nn.Module):
    """Two layers of four in an ``nn.ModuleList``, which counts from zero on each stage."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1)
        self.tied = nn.Linear(WIDTH, WIDTH)
        layers = Net().layers.values()
        self.layers = nn.ModuleList(list(layers)[2 * stage : 2 * stage + 2])
        with torch.no_grad():
            for parameter in (*self.tied.parameters(), *self.scale.parameters()):
                parameter.fill_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.tied(x)


@pytest.mark.parametrize("name", ["layers.0", "layers.1.up", "layers.1.casts.bool"])
def test_one_name_for_several_modules_is_refused(name: str) -> None:
    """Catches an edit of two layers for one; a module that stages share goes through."""
    run_ranks(_renumbered, 2, name)


def _renumbered(name: str) -> None:
    with wrapped([("tied", "forward", None)], model=Renumbered(dist.get_rank())) as flex:
        step(flex)
        flex.register_forward_hook(HookFunction(name))
        with pytest.raises(RegistrationError, match=r"stages \[0, 1\].*ModuleList"):
            step(flex)


# -- errors ------------------------------------------------------------------------------------


def test_ranks_with_other_hooks_are_told_apart_when_a_step_begins() -> None:
    """Catches a stage that waits for values which the one before does not send."""
    run_ranks(_disagreeing, 2, None, "layers.2")
    run_ranks(_disagreeing, 2, _mixing, "layers.0")


def _disagreeing(edit: Any, name: str) -> None:
    rank = dist.get_rank()
    hook: Hook = ("layers.0", "forward", None) if rank == 0 else (name, "forward", edit)
    flex = wrapped([hook])
    start = time.monotonic()
    with pytest.raises(RankDisagreementError) as caught, flex.step():
        raise AssertionError("the step has begun")
    assert time.monotonic() - start < SECONDS
    assert "layers.0 forward" in str(caught.value)
    assert name in str(caught.value)


def test_a_step_in_a_step_is_refused() -> None:
    """Catches gradients summed twice."""
    run_ranks(_step_in_step, 2)


def _step_in_step() -> None:
    flex = wrapped()
    with flex.step(), pytest.raises(ConfigurationError, match="under way"), flex.step():
        raise AssertionError("the step has begun")


def test_a_forward_outside_of_a_step_is_refused(tmp_path: Path) -> None:
    """Catches records that are never brought together. The next stage is in torch's hands alone."""
    first, second = _endings(tmp_path, 2, _without_step)
    assert "ConfigurationError" in first.text
    assert "with model.step():" in first.text
    assert second.seconds < SECONDS


def _without_step() -> None:
    run(schedule(wrapped([("layers.0", "forward", None)])))


def _fails(module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    raise ValueError("the reason")


@pytest.mark.parametrize("at", ["layers.0", "layers.3"])
@pytest.mark.parametrize("kind", ["forward", "full_backward_pre"])
def test_an_edit_that_raises_on_one_stage_is_named_on_every_rank(
    at: str, kind: str, tmp_path: Path
) -> None:
    """Catches a stage that waits in torch's own receiving for one that will not send."""
    told = _endings(tmp_path, 2, _failing_step, (at, kind, _fails))
    failing = 0 if at == "layers.0" else 1
    assert told[failing].text == "ValueError: the reason"
    for word in ("RankFailedError", f"rank {failing}", f"{at} {kind}", "ValueError: the reason"):
        assert word in told[1 - failing].text
    assert max(rank.seconds for rank in told) < SECONDS


def test_a_failed_step_leaves_the_gradients_of_before() -> None:
    """Catches gradients that had accumulated and are lost with the step that failed."""
    run_ranks(_failed, 2)


def _failed() -> None:
    trainable = probe()
    flex = wrapped(BOTH_STAGES, {"probe": trainable})
    step(flex)
    due = {name: p.grad.clone() for name, p in trainable.named_parameters()}
    with pytest.raises(ValueError, match="on every rank"):
        _step_that_fails(flex)
    for name, parameter in trainable.named_parameters():
        assert torch.equal(parameter.grad, due[name])
    step(flex, 2)
    truth = Truth(BOTH_STAGES, {"probe": probe()}).step(1).step(2)
    _same_gradients(trainable, truth.modules["probe"], "probe")


def _step_that_fails(flex: FlexModel) -> None:
    with flex.step():
        run(schedule(flex), 2)
        raise ValueError("on every rank")


# -- schedules and wrappers --------------------------------------------------------------------


def test_several_stages_on_a_rank_have_a_flex_model_each() -> None:
    """Catches records, values and gradients of one of them that go to the other."""
    run_ranks(_interleaved, 2)


def _interleaved() -> None:
    rank = dist.get_rank()
    hooks: list[Hook] = [
        ("embed", "forward", _writes),
        ("layers.0", "forward", _probing),
        ("layers.1", "forward", _reads),
        ("layers.2", "forward", _other_probing),
        ("layers.3", "forward", _other_probing),
        ("layers.3", "full_backward_pre", None),
    ]
    truth = Truth(hooks, {"probe": probe(), "other": probe(seed=6)})
    models = [Net(rank + 2 * chunk, 4) for chunk in range(2)]
    early = wrapped(hooks[:3], {"probe": probe()}, models[0])
    late = wrapped(hooks[3:], {"other": probe(seed=6)}, models[1])
    cpu = torch.device("cpu")
    stages = [PipelineStage(f, rank + 2 * n, 4, cpu) for n, f in enumerate((early, late))]
    running = ScheduleInterleaved1F1B(stages, MICROBATCHES, loss_fn=loss)
    for seed in (1, 2):
        for net in models:
            net.zero_grad()
        truth.model.zero_grad()
        with early.step(), late.step():
            run(running, seed)
        truth.step(seed)
    for flex, name in ((early, "probe"), (late, "other")):
        _same_gradients(flex.trainable_modules[name], truth.modules[name], name)
    for net in models:
        for name, parameter in net.named_parameters():
            close(parameter.grad, truth.model.get_parameter(name).grad, name)
    found = {**early.output_ptr, **late.output_ptr}
    for (name, kind), due in truth.records.items() if rank == 0 else ():
        key = name if kind == "forward" else f"{name}:{kind}"
        _same(found[key], due, key)
    late.register_trainable_module("probe", early.trainable_modules["probe"])
    with pytest.raises(ConfigurationError, match="'probe'"), early.step(), late.step():
        raise AssertionError("the step has begun")


def _other_probing(module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x + torch.tanh(modules["other"](x))


def test_stages_out_of_the_order_of_ranks_are_refused(tmp_path: Path) -> None:
    """Catches ranks that wait for one another's values, in schedules whose stages turn back."""
    told = _endings(tmp_path, 2, _turning_back)
    assert any("ConfigurationError: Stage 2 of the schedule is on rank 1" in t.text for t in told)


def _turning_back() -> None:
    rank, cpu = dist.get_rank(), torch.device("cpu")
    numbers = (rank, 3 - rank)
    early, late = (wrapped(model=Net(number, 4)) for number in numbers)
    stages = [PipelineStage(f, n, 4, cpu) for f, n in zip((early, late), numbers, strict=True)]
    running = ScheduleZBVZeroBubble(stages, MICROBATCHES, loss_fn=loss)
    with early.step(), late.step():
        run(running)


def test_ddp_inside_of_the_flex_model_is_refused(tmp_path: Path) -> None:
    """Catches gradients that DDP reduces in the midst of the step, which come out wrong."""
    for told in _endings(tmp_path, 4, _ddp_inside):
        assert "ConfigurationError" in told.text
        assert "DistributedDataParallel module itself" in told.text
        assert told.seconds < SECONDS


def _ddp() -> tuple[DistributedDataParallel, Any, int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = mesh.get_local_rank("pp")
    return DistributedDataParallel(Net(stage), process_group=mesh.get_group("dp")), mesh, stage


def _ddp_inside() -> None:
    module, mesh, number = _ddp()
    flex = FlexModel(module, {}, mesh=mesh)
    cpu = torch.device("cpu")
    stage = PipelineStage(flex, number, 2, cpu, group=mesh.get_group("pp"))
    running = Schedule1F1B(stage, MICROBATCHES, loss_fn=loss)
    x, weights = data()
    with flex.step():
        running.step(*((x,) if number == 0 else ()), target=weights if number else None)


@pytest.mark.parametrize("scale", [True, False])
def test_ddp_given_to_the_stage_itself(scale: bool) -> None:
    """Catches trainable modules that are not scaled where torch scales the model it was given."""
    run_ranks(_ddp_given, 4, scale)


def _ddp_given(scale: bool) -> None:
    hooks: list[Hook] = [*BOTH_STAGES, ("layers.1", "forward", _writes_norm)]
    truth = Truth(hooks, {"probe": probe()}).step()
    module, mesh, number = _ddp()
    flex = FlexModel(module, {}, mesh=mesh, keep="all")
    trainable = probe()
    flex.register_trainable_module("probe", trainable)
    for name, kind, edit in hooks:
        getattr(flex, f"register_{kind}_hook")(HookFunction(name, editing_function=edit))
    stage = PipelineStage(module, number, 2, torch.device("cpu"), group=mesh.get_group("pp"))
    # One process' loss is the mean over replicas of what each computes.
    factor = 2 if scale else 2 / MICROBATCHES
    running = Schedule1F1B(
        stage, MICROBATCHES, loss_fn=lambda out, w: factor * loss(out, w), scale_grads=scale
    )
    x, weights = (t.view(MICROBATCHES, 2, -1, TOKENS, WIDTH) for t in data())
    own = mesh.get_local_rank("dp")
    x, weights = x[:, own].flatten(0, 1), weights[:, own].flatten(0, 1)
    with flex.step():
        running.step(*((x,) if number == 0 else ()), target=weights if number else None)
    _same_gradients(trainable, truth.modules["probe"], "probe")
    for name, parameter in module.module.named_parameters():
        close(parameter.grad, truth.model.get_parameter(name).grad, name)
    close(flex.save_ctx.norm, truth.save_ctx.norm.detach(), "norm")
    for (name, _), due in truth.records.items():
        _same(flex.output_ptr[name], due, name)


def _writes_norm(module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    save_ctx.norm = x.norm(dim=-1)
    assert x.shape == (SAMPLES, TOKENS, WIDTH)
    return x


# -- leaving -----------------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    """Catches hooks that stay on the model, and a pipeline that still asks for steps."""
    run_ranks(_left, 2)


def _left() -> None:
    model = Net(dist.get_rank())
    before = _hooks_of(model)
    flex = wrapped([*EVERY_KIND, *BOTH_STAGES[:1]], {"probe": probe()}, model)
    step(flex)
    flex.restore()
    assert _hooks_of(model) == before
    model.zero_grad()
    truth = Truth(()).step()
    run(schedule(model))
    for name, parameter in model.named_parameters():
        close(parameter.grad, truth.model.get_parameter(name).grad, name)


def _hooks_of(model: nn.Module) -> list[Any]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = [len(getattr(m, name)) for m in model.modules() for name in names]
    return [*found, *(m._is_full_backward_hook for m in model.modules())]
