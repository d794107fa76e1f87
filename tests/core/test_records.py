"""What is kept of an activation: whole copies, in order, where they were asked for."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import BATCH, INNER, TOKENS, WIDTH, batch, close, ways, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from flex_model import FlexModel, HookFunction
from flex_model.testing.ranks import run_ranks

Records = dict[str, list[Tensor]]


class Overwrites(nn.Module):
    """Changes its input in place after it was handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Identity()
        self.second = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x * 1)
        y.add_(100)
        y = self.second(y)
        return y.mul_(0)


def _double_in_place(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x.mul_(2)


# -- one process -------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", [None, _double_in_place])
def test_records_are_copies(edit: Callable[..., Tensor] | None) -> None:
    """Catches a record that a later operation in place, of the model or of an edit, rewrites."""
    records: Records = {}
    with FlexModel(Overwrites(), records) as model:
        for name in ("first", "second"):
            model.register_forward_hook(HookFunction(name, editing_function=edit))
        model(torch.ones(3))
    factor = 1 if edit is None else 2
    assert records["first"][0].tolist() == [1.0] * 3
    assert records["second"][0].tolist() == [100.0 + factor] * 3


def test_a_record_is_the_callers_own() -> None:
    """Catches a record that reaches into the model: writing to it must change nothing there."""
    layer = nn.Linear(2, 2)
    records: Records = {}
    before = layer.weight.detach().clone()

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.layer.weight) @ x

    with FlexModel(Own(), records) as model:
        model.register_forward_hook(HookFunction("inner"))
        out = model(torch.ones(2))
        records["inner"][0].fill_(77)
        assert torch.equal(model(torch.ones(2)), out)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.ones(2, 3, dtype=torch.bool),
        torch.ones(2, 3, dtype=torch.int64),
        torch.ones(2, 3, dtype=torch.complex64),
        torch.ones(()),
        torch.ones(0, 3),
        torch.ones(3).expand(2, 3),
        torch.arange(12.0).reshape(3, 4).mT[::2],
    ],
    ids=lambda value: f"{value.dtype} {tuple(value.shape)}",
)
def test_a_record_is_detached_on_the_cpu_and_of_the_same_kind(value: Tensor) -> None:
    """Catches records that are cast, that hold on to the graph, or that lose their shape."""

    class Gives(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1 if x.dtype != torch.bool else x.clone()

    records: Records = {}
    if value.is_floating_point() and value.is_leaf:
        value = value.clone().requires_grad_()
    with FlexModel(nn.Sequential(Gives()), records) as model:
        model.register_forward_hook(HookFunction("0"))
        model(value)
    (record,) = records["0"]
    assert not record.requires_grad
    assert record.grad_fn is None
    assert record.device.type == "cpu"
    assert record.dtype == value.dtype
    assert torch.equal(record, value)


def test_one_record_per_call_in_the_order_of_calls() -> None:
    """Catches records overwritten, or listed in the order of registration."""
    records: Records = {}
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with FlexModel(model, records) as flex:
        flex.register_forward_hook(HookFunction("1"))
        flex.register_forward_hook(HookFunction("0"))
        for number in range(4):
            flex(torch.full((1,), float(number)))
    assert list(records) == ["0", "1"], "forward order"
    for name in ("0", "1"):
        assert [record.item() for record in records[name]] == [0, 1, 2, 3]


def test_a_layer_called_twice_is_recorded_twice() -> None:
    """Catches one record per forward where there is one per call."""
    layer = nn.ReLU()
    records: Records = {}
    with FlexModel(nn.Sequential(layer, nn.Linear(2, 2), layer), records) as model:
        model.register_forward_hook(HookFunction("0"))
        model(torch.ones(1, 2))
    assert len(records["0"]) == 2


def test_the_dict_is_only_appended_to() -> None:
    """Catches a dict that is cleared, replaced, or remembered after the caller cleared it."""
    kept = torch.zeros(1)
    records: Records = {"0": [kept], "other": []}
    with FlexModel(nn.Sequential(nn.Identity()), records) as model:
        model.register_forward_hook(HookFunction("0"))
        model(torch.ones(1))
        assert records["0"][0] is kept
        assert len(records["0"]) == 2
        assert records["other"] == []
        records.clear()
        model(torch.ones(1))
        assert [len(tensors) for tensors in records.values()] == [1]
        del records["0"][:]
        model(torch.ones(1))
        assert len(records["0"]) == 1


def test_an_edited_activation_is_recorded_as_it_was_before() -> None:
    """Catches a record after the edit; and hook functions on one tensor that record it each."""
    records: Records = {}
    with FlexModel(nn.Sequential(nn.Identity()), records) as model:
        model.register_forward_hook(HookFunction("0", editing_function=_double_in_place))
        model.register_forward_hook(HookFunction("0", editing_function=_double_in_place))
        model.register_forward_hook(HookFunction("0"))
        assert model(torch.ones(1)).item() == 4
    assert [record.item() for record in records["0"]] == [1.0]


def test_edits_of_one_activation_follow_each_other() -> None:
    """Catches edits that run in another order, or each on the original."""
    with FlexModel(nn.Sequential(nn.Identity()), {}) as model:
        for number in (1.0, 2.0, 3.0):
            model.register_forward_hook(
                HookFunction(
                    "0",
                    editing_function=lambda module, x, save_ctx, modules, number=number: (
                        x * 10 + number
                    ),
                )
            )
        assert model(torch.zeros(1)).item() == 123


def test_kinds_of_hooks_on_one_module_have_records_of_their_own() -> None:
    """Catches forward and backward records in one list, as in flex-model 0.1.0."""
    records: Records = {}
    with FlexModel(nn.Sequential(nn.Linear(2, 3)), records) as model:
        hooks = {}
        for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
            hooks[kind] = HookFunction("0")
            getattr(model, f"register_{kind}_hook")(hooks[kind])
        keys = {kind: model.record_key(hook) for kind, hook in hooks.items()}
        model(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert keys["forward"] == "0"
    assert len(set(keys.values())) == 4
    assert set(records) == set(keys.values())
    assert records[keys["forward"]][0].shape == (1, 3)
    assert records[keys["forward_pre"]][0].shape == (1, 2)
    assert records[keys["full_backward"]][0].shape == (1, 2)
    assert records[keys["full_backward_pre"]][0].shape == (1, 3)


def test_tensors_of_one_output_have_records_of_their_own() -> None:
    """Catches two outputs of one module mixed in one list."""

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x + 1

    records: Records = {}
    with FlexModel(nn.Sequential(Two()), records) as model:
        first, second = HookFunction("0"), HookFunction("0", unpack_idx=1)
        model.register_forward_hook(second)
        model.register_forward_hook(first)
        model(torch.zeros(1))
        assert records[model.record_key(first)][0].item() == 0
        assert records[model.record_key(second)][0].item() == 1


# -- ranks -------------------------------------------------------------------------------------


def _truth(site: str) -> Records:
    """What raw hooks of one process see of every kind, of a loss that is the output's sum."""
    model, x, seen = whole(), batch(), {}
    module = model.get_submodule(site)

    def keep(kind: str, tensors: Any) -> None:
        tensor = tensors[0] if isinstance(tensors, tuple) else tensors
        seen[kind] = [tensor.detach().clone()]

    module.register_forward_hook(lambda m, args, out: keep("forward", out))
    module.register_forward_pre_hook(lambda m, args: keep("forward_pre", args))
    module.register_full_backward_hook(lambda m, grads, _: keep("full_backward", grads))
    module.register_full_backward_pre_hook(lambda m, grads: keep("full_backward_pre", grads))
    model(x).pow(2).sum().backward()
    return seen


def _kept(keep: Any, holders: list[int]) -> None:
    for way in ways():
        for site in ("0.norm", "0.up", "0.act", "0.down", "0"):
            truth = _truth(site)
            records: Records = {}
            with way.flex(way.model(), records, keep=keep, data_parallel_loss="sum") as flex:
                keys = {}
                for kind in truth:
                    hook = HookFunction(site)
                    getattr(flex, f"register_{kind}_hook")(hook)
                    keys[kind] = flex.record_key(hook)
                for _ in range(2):
                    flex(way.leaf()).pow(2).sum().backward()
            if dist.get_rank() not in holders:
                assert records == {}, f"{way.name}, {site}, keep={keep}"
                continue
            for kind, due in truth.items():
                assert len(records[keys[kind]]) == 2, f"{way.name}, {site}, {kind}"
                for record in records[keys[kind]]:
                    assert not record.requires_grad
                    close(record, due[0], f"{way.name}, {site}, {kind}, keep={keep}")


@pytest.mark.parametrize(("keep", "holders"), [("first", [0]), ("all", [0, 1]), (1, [1]), (0, [0])])
def test_whole_records_where_they_are_kept_and_nowhere_else(keep: Any, holders: list[int]) -> None:
    """Catches shards recorded as if whole, batches of one replica alone, and copies on ranks that
    did not ask for them.
    """
    run_ranks(_kept, 2, keep, holders)


def _on_two_by_two(keep: Any, holders: list[int]) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = whole()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model[0], mesh["tp"], plan)
    part = batch().detach().chunk(2)[mesh.get_local_rank("dp")]
    for site in ("0.norm", "0.up", "0.act", "0.down"):
        due = _truth(site)["forward"][0]
        for edit in (None, lambda module, x, save_ctx, modules: x * 1):
            records: Records = {}
            with FlexModel(model, records, mesh=mesh, keep=keep) as flex:
                flex.register_forward_hook(HookFunction(site, editing_function=edit))
                for _ in range(2):
                    flex(part)
            if dist.get_rank() in holders:
                assert len(records[site]) == 2
                for record in records[site]:
                    close(record, due, f"{site}, keep={keep}")
            else:
                assert records == {}


@pytest.mark.parametrize(("keep", "holders"), [("first", [0]), ("all", [0, 1, 2, 3]), (3, [3])])
def test_whole_over_both_mesh_dims(keep: Any, holders: list[int]) -> None:
    """Catches a record that is whole over one mesh dim only."""
    run_ranks(_on_two_by_two, 4, keep, holders)


def _copies() -> None:
    sites = ("0.norm", "0.up", "0.act", "0.down")
    for way in ways():
        model = way.model()
        outputs: list[Tensor] = []
        for site in sites:
            model.get_submodule(site).register_forward_hook(
                lambda module, args, out, outputs=outputs: outputs.append(out)
            )
        records: Records = {}
        with way.flex(model, records, keep="all") as flex, torch.no_grad():
            for site in sites:
                flex.register_forward_hook(HookFunction(site))
            flex(way.leaf())
        for tensor in outputs:
            tensor.fill_(77)
        for site in sites:
            close(records[site][0], _truth(site)["forward"][0], f"{way.name}, {site}")


def test_records_of_shards_are_copies_too() -> None:
    """Catches an alias where nothing had to be moved: a replicated value."""
    run_ranks(_copies, 2)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _traffic_of(run: Callable[[], object]) -> Counter[str]:
    with _Count() as count:
        run()
    return count.calls


def _traffic() -> None:
    way = ways()[0]
    model = way.model()
    x = way.leaf().detach()
    bare = _traffic_of(lambda: model(x))

    def extra(*hooks: HookFunction) -> Counter[str]:
        with way.flex(model, {}) as flex:
            for hook in hooks:
                flex.register_forward_hook(hook)
            flex(x)  # the first forward finds the layout
            return _traffic_of(lambda: flex(x)) - bare

    def edit(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
        return x + 1

    gathered = extra(HookFunction("0.up"))
    assert sum(gathered.values()) == 1, gathered
    assert "gather_" in gathered, f"retrieval is a gather to one rank, not {gathered}"
    edited = extra(HookFunction("0.up", editing_function=edit))
    assert edited == Counter({"_allgather_base_": 1}), f"an edit is one all-gather, not {edited}"
    both = extra(HookFunction("0.up"), HookFunction("0.up", editing_function=edit))
    assert both == edited, f"a record of what was gathered costs nothing, not {both}"
    whole_value = extra(HookFunction("0.norm", editing_function=edit))
    assert not whole_value, f"a replicated value moves nothing, not {whole_value}"


def test_what_records_cost() -> None:
    """Catches a second transfer of what an edit gathered, and an all-gather for one rank's copy."""
    run_ranks(_traffic, 2)


def test_shapes_of_the_small_model() -> None:
    """Catches a truth with equal sizes, in which a swapped dim would not show."""
    sizes = (BATCH, TOKENS, WIDTH, INNER)
    assert len(set(sizes)) == len(sizes)
