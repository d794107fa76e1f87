"""Editing functions that declare to need less than the whole: the same result, no traffic."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import BATCH, INNER, batch, plain_gradients, weights_of_loss, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from flex_model import FlexModel, HookFunction, channelwise, elementwise, reduces, tokenwise
from flex_model.errors import EditError
from flex_model.testing.compare import relative_error
from flex_model.testing.ranks import RankFailure, run_ranks

TOLERANCE = 1e-5  # row-parallel sums are added up in another order
HOOKED = "0.act"  # cut along the features over tp and along the batch over dp


class Gain(nn.Module):
    """A gain for each channel, and one for all."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.each = nn.Parameter(torch.randn(INNER, generator=generator))
        self.all = nn.Parameter(torch.randn((), generator=generator))
        self.unused = nn.Parameter(torch.ones(3))


@elementwise
def bent(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x + modules["gain"].all * x.sin()


@channelwise
def scaled(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any, *, shard: Any) -> Tensor:
    return x * shard.take(modules["gain"].each) / x.square().mean((0, 1)).sqrt()


@tokenwise
def normed(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return torch.softmax(x * modules["gain"].each, -1)


@elementwise
def noisy(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    per_token = torch.rand(x.shape[0], x.shape[1], 1)
    kept = torch.nn.functional.dropout(x * modules["gain"].all, 0.3)
    return kept + torch.randn_like(x) * per_token + torch.bernoulli(x.sigmoid()) + torch.rand(())


EDITS = {edit.__name__: edit for edit in (bent, scaled, normed, noisy)}


@reduces("sum", over=(0, 1))
def energy(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x.square().sum((0, 1))


@reduces("mean", over=(0, 1))
def mean(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x.mean((0, 1), keepdim=True)


@reduces("max", over=(2,))
def largest(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x.amax(2)


STATISTICS = (energy, mean, largest)


@dataclass
class Run:
    """What one run of the model leaves behind."""

    out: Tensor
    gains: dict[str, Tensor]
    weights: dict[str, Tensor]
    records: dict[str, list[Tensor]]


@dataclass
class Job:
    """This rank's place in a job of ``dp x tp`` ranks.

    ``replicas`` is over how many losses the mean is taken: one process does it for the others.
    """

    dp: int
    tp: int
    replicas: int = 1

    @property
    def mesh(self) -> DeviceMesh | None:
        if self.dp * self.tp == 1:
            return None
        return init_device_mesh("cpu", (self.dp, self.tp), mesh_dim_names=("dp", "tp"))

    def part(self, x: Tensor) -> Tensor:
        return x.chunk(self.dp)[dist.get_rank() // self.tp] if self.dp > 1 else x

    @contextmanager
    def flex(self, records: dict[str, list[Tensor]], **options: Any) -> Iterator[FlexModel]:
        model, mesh = whole(), self.mesh
        if self.tp > 1:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(model[0], mesh["tp"], plan)
        options = options if mesh is None else {**options, "mesh": mesh}
        with FlexModel(model, records, **options) as flex:
            flex.register_trainable_module("gain", Gain())
            yield flex


def _run(job: Job, kind: str, *functions: Callable[..., Tensor], **options: Any) -> Run:
    records: dict[str, list[Tensor]] = {}
    with job.flex(records, seed=4, **options) as flex:
        for function in functions:
            hook = HookFunction(HOOKED, editing_function=function)
            getattr(flex, f"register_{kind}_hook")(hook)
        out = flex(job.part(batch().detach()))
        ((out * job.part(weights_of_loss())).sum() / job.replicas).backward()
        gain = flex.trainable_modules["gain"]
        gains = {n: p.grad for n, p in gain.named_parameters() if p.grad is not None}
        weights = plain_gradients(flex.module)
        for grad in weights.values():
            if job.dp > 1:
                dist.all_reduce(grad, group=job.mesh["dp"].get_group())
                grad /= job.dp
    return Run(out.detach(), gains, weights, records)


def _undeclared(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, given the whole tensor."""

    def on_whole(*args: Any) -> Tensor:
        shard = type("Everything", (), {"take": staticmethod(lambda x: x)})
        return function(*args, **({"shard": shard} if function is scaled else {}))

    return on_whole


def _truth(kind: str, names: tuple[str, ...], replicas: int) -> Run:
    return _run(Job(1, 1, replicas), kind, *(_undeclared(EDITS[name]) for name in names))


def _same_as(job: Job, kind: str, names: tuple[str, ...], due: Run, debug: bool) -> None:
    torch.manual_seed(100 + dist.get_rank())
    run = _run(job, kind, *(EDITS[name] for name in names), debug=debug)
    assert relative_error(run.out, job.part(due.out)) <= TOLERANCE
    assert run.gains.keys() == due.gains.keys()
    for name, grad in run.gains.items():
        assert relative_error(grad, due.gains[name]) <= TOLERANCE, name
    for name, grad in run.weights.items():
        assert relative_error(grad, due.weights[name]) <= TOLERANCE, name
    assert not run.records, "what needs no whole tensor is not made whole for a record"


@pytest.mark.parametrize("kind", ["forward", "full_backward"])
@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize(
    "names",
    [("bent",), ("scaled",), ("normed",), ("noisy",), ("bent", "normed", "scaled", "noisy")],
    ids="-".join,
)
def test_a_declared_edit_equals_one_process(
    dp: int, tp: int, kind: str, names: tuple[str, ...]
) -> None:
    """Catches a gradient that lacks the other ranks' terms, and noise of the shard's own."""
    due = run_ranks(_truth, 1, kind, names, dp)[0]
    run_ranks(_same_as, dp * tp, Job(dp, tp), kind, names, due, False)


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 1)])
def test_debugging_changes_nothing(dp: int, tp: int) -> None:
    """Catches the second run of debug mode in the result, or in the random numbers."""
    names = ("bent", "noisy")
    due = run_ranks(_truth, 1, "forward", names, dp)[0]
    run_ranks(_same_as, dp * tp, Job(dp, tp), "forward", names, due, True)


def _statistics(job: Job) -> dict[str, list[Tensor]]:
    return _run(job, "forward", *STATISTICS, debug=True).records


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 1), (2, 2)])
def test_a_statistic_combines_to_that_of_the_whole(dp: int, tp: int) -> None:
    """Catches a mean of means, a sum over one rank's tokens, channels out of order."""
    due = run_ranks(_statistics, 1, Job(1, 1))[0]
    found = run_ranks(_statistics, dp * tp, Job(dp, tp))
    assert found[0].keys() == due.keys() == {f"{HOOKED}:{f.__name__}" for f in STATISTICS}
    for key, values in due.items():
        assert relative_error(found[0][key][0], values[0]) <= TOLERANCE, key


def test_truth_of_statistics() -> None:
    """Catches a one-process statistic that is wrong itself."""
    model = whole()
    x = batch().detach()
    act = model[0].act(model[0].up(model[0].norm(x)))
    found = run_ranks(_statistics, 1, Job(1, 1))[0]
    assert relative_error(found[f"{HOOKED}:energy"][0], act.square().sum((0, 1))) <= 1e-6
    assert relative_error(found[f"{HOOKED}:mean"][0], act.mean((0, 1), keepdim=True)) <= 1e-6
    assert relative_error(found[f"{HOOKED}:largest"][0], act.amax(2)) <= 1e-6
    assert act.shape[0] == BATCH


# -- what is moved -----------------------------------------------------------------------------


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@channelwise
def watched(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    save_ctx.peaks = x.abs().amax((0, 1))  # this rank's channels
    return x


def _counted(job: Job, functions: tuple[Callable[..., Tensor], ...]) -> tuple[Counter[str], ...]:
    def traffic(with_hooks: bool) -> tuple[Counter[str], Counter[str]]:
        with job.flex({}) as flex:
            for function in functions if with_hooks else ():
                flex.register_forward_hook(HookFunction(HOOKED, editing_function=function))
                flex.register_forward_hook(HookFunction("0.up", editing_function=function))
            x = job.part(batch().detach())
            flex(x)  # the first forward finds the layout
            with _Count() as forward:
                out = flex(x)
            with _Count() as backward:
                out.sum().backward()
        return forward.calls, backward.calls

    bare, hooked = traffic(False), traffic(True)
    return hooked[0] - bare[0], hooked[1] - bare[1]


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 1), (1, 4), (4, 1), (2, 2)])
def test_an_elementwise_edit_moves_nothing(dp: int, tp: int) -> None:
    """Catches a gather that a shard makes needless; its module's gradients take one all-reduce."""
    for forward, backward in run_ranks(_counted, dp * tp, Job(dp, tp), (bent,)):
        assert not forward, forward
        assert backward == Counter({"allreduce_": 1}), backward


@pytest.mark.parametrize("tp", [2, 4])
def test_a_channelwise_statistic_on_its_channels_moves_nothing(tp: int) -> None:
    """Catches the same for what the shard tells of its own channels."""
    for forward, backward in run_ranks(_counted, tp, Job(1, tp), (watched,)):
        assert not forward, forward
        assert not backward, backward


# -- claims ------------------------------------------------------------------------------------


@elementwise
def claims_too_much(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x - x.mean()


@reduces("sum", over=(0, 1))
def claims_to_be_a_sum(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x.norm(dim=(0, 1))


def _claims(job: Job, function: Callable[..., Tensor]) -> None:
    with pytest.raises(EditError, match=rf"0\.act.*rank.*{function.__name__}"):
        _run(job, "forward", function, debug=True)


@pytest.mark.parametrize("function", [claims_too_much, claims_to_be_a_sum])
def test_debugging_names_a_function_that_claims_too_much(function: Callable[..., Tensor]) -> None:
    """Catches a wrong claim that goes unnoticed."""
    run_ranks(_claims, 2, Job(2, 1), function)


@elementwise
def draws_by_value(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return torch.poisson(x.abs())


@elementwise
def draws_by_rows(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x + torch.rand(3 * x.shape[-1])[: x.shape[-1]]


@pytest.mark.parametrize("function", [draws_by_value, draws_by_rows])
def test_noise_that_cannot_be_cut_is_refused(function: Callable[..., Tensor]) -> None:
    """Catches noise that differs from the whole edit's, silently."""
    with pytest.raises(RankFailure) as caught:
        run_ranks(_run, 2, Job(1, 2), "forward", function)
    assert {failure.kind for failure in caught.value.failures.values()} == {"EditError"}
