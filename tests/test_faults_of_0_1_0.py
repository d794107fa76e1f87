"""What went wrong in flex-model 0.1.0: a test for each fault of its hooks and its wrapper, by the
number it was found under. Two are no matter of hooks on one replica: the fourth, a rank that raises
and leaves the others waiting, and the tenth, pipeline transfer.
"""

import copy
from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from flex_model import FlexModel, HookFunction
from flex_model.errors import EditError, HintError, LayoutError
from flex_model.testing.ranks import run_ranks

Records = dict[str, list[Tensor]]

BATCH, WIDTH, INNER = 6, 7, 8


def _values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _whole() -> nn.Sequential:
    """The same values in every process."""
    model = nn.Sequential(nn.Linear(WIDTH, INNER), nn.Tanh(), nn.Linear(INNER, WIDTH))
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(_values(*parameter.shape, seed=seed) * 0.5)
    return model


def _sharded(**plan: ParallelStyle) -> nn.Sequential:
    model = _whole()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    styles = {"0": ColwiseParallel(), "2": RowwiseParallel(), **plan}
    parallelize_module(model, mesh, styles)
    return model


def _mixing(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x.softmax(-1) + x.roll(1, 0)


def _probing(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return modules["probe"](x) + x.roll(1, 0)


def _random(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return nn.functional.dropout(x, 0.5, training=True) + torch.randn_like(x)


def _probe() -> nn.Linear:
    probe = nn.Linear(INNER, INNER)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(_values(*parameter.shape, seed=40) * 0.3)
    return probe


def _truth(edit: Any, dp: int = 1) -> tuple[Tensor, Tensor, nn.Linear]:
    """Output, input gradient and trained probe of one process under a raw hook."""
    model, probe, x = _whole(), _probe(), _values(BATCH, WIDTH).requires_grad_()
    if edit is not None:
        model[0].register_forward_hook(lambda m, args, out: edit(m, out, None, {"probe": probe}))
    out = model(x)
    ((out * _values(BATCH, WIDTH, seed=5)).sum() / dp).backward()
    assert x.grad is not None
    return out.detach(), x.grad, probe


def _job(edit: Any, dp: bool) -> tuple[Tensor, Tensor, nn.Linear]:
    """The same on two ranks, in the rank's own terms."""
    rank = dist.get_rank()
    model = _whole() if dp else _sharded()
    sizes = {"data_parallel_size": 2} if dp else {"tensor_parallel_size": 2}
    probe = _probe()
    with FlexModel(model, {}, **sizes) as flex:
        flex.register_trainable_module("probe", probe)
        flex.register_forward_hook(HookFunction("0", editing_function=edit))
        x, weight = _values(BATCH, WIDTH), _values(BATCH, WIDTH, seed=5)
        if dp:
            x, weight = x.chunk(2)[rank], weight.chunk(2)[rank]
        x = x.clone().requires_grad_()
        out = flex(x)
        (out * weight).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad, probe


# -- 1, 2, 3: gradients and random edits -------------------------------------------------------


def _fault_1() -> None:
    for dp in (False, True):
        for edit in (None, _mixing):
            out, grad, _ = _job(edit, dp)
            due_out, due_grad, _ = _truth(edit, 2 if dp else 1)
            rank, parts = dist.get_rank(), 2 if dp else 1
            due_out, due_grad = (t.chunk(parts)[rank % parts] for t in (due_out, due_grad))
            torch.testing.assert_close(out, due_out)
            torch.testing.assert_close(grad, due_grad * parts)
            assert grad.abs().max() > 0.01


def test_fault_1_the_upstream_gradient_was_zero() -> None:
    run_ranks(_fault_1, 2)


def _fault_2() -> list[Tensor]:
    found = []
    for dp in (False, True):
        *_, probe = _job(_probing, dp)
        *_, due = _truth(_probing, 2 if dp else 1)
        for name, parameter in probe.named_parameters():
            torch.testing.assert_close(parameter.grad, due.get_parameter(name).grad)
            found.append(parameter.grad)
    return found


def test_fault_2_trainable_modules_got_a_part_of_the_gradient_on_each_rank() -> None:
    for first, second in zip(*run_ranks(_fault_2, 2), strict=True):
        assert torch.equal(first, second)


def _fault_3() -> tuple[Tensor, Tensor]:
    torch.manual_seed(dist.get_rank())
    return _job(_random, dp=False)[0], _job(_random, dp=True)[0]


def test_fault_3_random_edits_differed_between_ranks() -> None:
    (tp_0, dp_0), (tp_1, dp_1) = run_ranks(_fault_3, 2)
    assert torch.equal(tp_0, tp_1)
    torch.testing.assert_close(torch.cat([dp_0, dp_1]), tp_0)


# -- 5, 6: errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("result", [None, "text", 3.0])
def test_fault_5_an_edit_that_returns_no_tensor_was_an_error_of_another_part(result: Any) -> None:
    with FlexModel(_whole(), {}) as model:
        model.register_forward_hook(HookFunction("0", editing_function=lambda *args: result))
        with pytest.raises(EditError, match="returned"):
            model(torch.ones(1, WIDTH))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_fault_5_another_dtype_failed_far_downstream(dtype: torch.dtype) -> None:
    with FlexModel(_whole(), {}) as model:
        edit = HookFunction("0", editing_function=lambda module, x, save_ctx, modules: x.to(dtype))
        model.register_forward_hook(edit)
        with pytest.raises(EditError, match=str(dtype)):
            model(torch.ones(1, WIDTH))


def _fault_6() -> None:
    with FlexModel(nn.Sequential(nn.Identity()), {}, 2) as model:
        model.register_forward_hook(HookFunction("0", (None, 9, INNER)))
        with pytest.raises(HintError, match=r"\(2, 7, 8\)"):
            model(_values(2, 7, 8))
    sharded = _sharded()
    for hint in [(None, None, INNER), (99, INNER), (None, 99), (1, INNER), (BATCH, INNER // 2)]:
        with FlexModel(sharded, {}, 2) as model:
            model.register_forward_hook(HookFunction("0", hint))
            with pytest.raises(HintError, match=f"rank {dist.get_rank()}"):
                model(_values(BATCH, WIDTH))
    # Without a hint the shard came, silently: now the whole, or, where nothing tells, an error.
    records: Records = {}
    with FlexModel(sharded, records, 2, keep="all") as model:
        model.register_forward_hook(HookFunction("0"))
        model(_values(BATCH, WIDTH))
    assert records["0"][0].shape == (BATCH, INNER)
    with FlexModel(nn.Sequential(nn.Identity()), {}, 2) as model:
        model.register_forward_hook(HookFunction("0"))
        with pytest.raises(LayoutError, match="rank"):
            model(_values(2, 7, 8, seed=dist.get_rank()))


def test_fault_6_wrong_shapes_were_silent() -> None:
    run_ranks(_fault_6, 2)


# -- 7, 8, 9: what a wrapper remembers, and what always raised ---------------------------------


def _fault_7() -> None:
    records: Records = {}
    with FlexModel(_sharded(), records, 2, keep="all") as model:
        model.register_full_backward_pre_hook(HookFunction("0"))
        with torch.no_grad():
            model(_values(BATCH, WIDTH))
        out = model(_values(BATCH, WIDTH).requires_grad_())
        (out * 0).sum().backward()
        assert all(not record.any() for record in records.get("0", []))
        records.clear()
        model(_values(BATCH, WIDTH).requires_grad_()).sum().backward()
    truth = _whole()
    seen: list[Tensor] = []
    truth[0].register_full_backward_pre_hook(lambda module, grads: seen.append(grads[0].clone()))
    truth(_values(BATCH, WIDTH).requires_grad_()).sum().backward()
    torch.testing.assert_close(records["0"][0], seen[0])


def test_fault_7_the_first_gradient_decided_for_every_later_one() -> None:
    run_ranks(_fault_7, 2)


def test_fault_8_a_group_switched_off_stayed_off_and_could_not_be_restored() -> None:
    records: Records = {}
    model = FlexModel(_whole(), records)
    hook = HookFunction("0")
    model.register_forward_hook(hook)
    model.update_hook_groups([hook], "mine")
    for groups, complement in [("mine", True), ("mine", False), ("mine", True), ("all", False)]:
        model(torch.ones(1, WIDTH), groups=groups, complement=complement)
    assert len(records["0"]) == 2
    model(torch.ones(1, WIDTH), groups="mine", complement=True)
    assert not model.restore()[0]._forward_hooks


def _fault_9() -> None:
    model = FlexModel(_sharded(), {}, 2)
    model.create_hook_group("mine", "0", (None, INNER), None, 0, "forward")
    model(_values(BATCH, WIDTH))
    for name, due in _whole().named_parameters():
        whole_shape = tuple(due.shape)
        assert torch.equal(model.get_module_parameter(name, whole_shape), due)
        assert torch.equal(model.get_module_parameter(name), due)
    model.register_trainable_module("probe", _probe())
    assert model.all_modules_names == ["", "0", "1", "2", "probe"]
    model.restore()


def test_fault_9_methods_that_always_raised() -> None:
    run_ranks(_fault_9, 2)


# -- 11, 12, 13: what was left out in silence --------------------------------------------------


def _fault_11() -> Tensor:
    probe = _probe()
    with FlexModel(_sharded(), {}, 2) as model:
        model.register_trainable_module("probe", probe)
        model.register_forward_hook(HookFunction("0", editing_function=_probing))
        assert {id(p) for p in probe.parameters()} <= {id(p) for p in model.parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(_values(BATCH, WIDTH)).pow(2).sum().backward()
        optimizer.step()
    assert not torch.equal(probe.weight, _probe().weight)
    return probe.weight.detach()


def test_fault_11_an_optimizer_never_trained_the_edit() -> None:
    first, second = run_ranks(_fault_11, 2)
    assert torch.equal(first, second)


class _ByKeyword(nn.Module):
    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model[2](self.model[1](input=self.model[0](x)))


def _fault_12() -> None:
    due = _ByKeyword(_whole())
    due.model[1].register_forward_pre_hook(
        lambda module, args, kwargs: ((), {"input": _mixing(module, kwargs["input"], None, None)}),
        with_kwargs=True,
    )
    x = _values(BATCH, WIDTH)
    records: Records = {}
    with FlexModel(_ByKeyword(_sharded()), records, 2, keep="all") as model:
        model.register_forward_pre_hook(HookFunction("model.1", editing_function=_mixing))
        torch.testing.assert_close(model(x), due(x))
    torch.testing.assert_close(records["model.1"][0], _whole()[0](x))


def test_fault_12_modules_called_by_keyword_were_not_seen() -> None:
    run_ranks(_fault_12, 2)


Named = namedtuple("Named", ["x", "y"])


class _Packed(nn.Module):
    """A layer's output as something else than a tensor."""

    def __init__(self, layer: nn.Module, how: str) -> None:
        super().__init__()
        self.layer = layer
        self.how = how

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        if self.how == "dict":
            return {"note": "x", "y": y}
        if self.how == "named tuple":
            return Named(None, y)
        return BaseModelOutput(last_hidden_state=y) if self.how == "model output" else y


class _Unpacks(nn.Module):
    def forward(self, packed: Any) -> Tensor:
        if isinstance(packed, dict) and "y" in packed:
            return packed["y"]
        if isinstance(packed, Named):
            return packed.y
        return packed.last_hidden_state if isinstance(packed, BaseModelOutput) else packed


def _fault_13() -> None:
    x = _values(BATCH, WIDTH)
    for how in ("dict", "named tuple", "model output"):
        sharded = _sharded()
        packed = nn.Sequential(_Packed(sharded[0], how), _Unpacks(), *sharded[1:])
        _same_as_one_process(packed, "0", x, how)
    # DTensors handed from layer to layer, and the sum that is still under way (a Rowwise output).
    _same_as_one_process(
        _sharded(**{"0": ColwiseParallel(use_local_output=False)}), "0", x, "DTensor"
    )
    _same_as_one_process(_sharded(), "2", x, "AsyncCollectiveTensor")
    early = _whole()
    with FlexModel(early, {}, 2) as model:
        model.register_forward_hook(HookFunction("0", editing_function=_mixing))
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        parallelize_module(early, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        torch.testing.assert_close(model(x), _edited_truth("0", x))
    with FlexModel(nn.Sequential(_GivesParameter()), {}, 2) as model:
        model.register_forward_hook(HookFunction("0", editing_function=_mixing))
        torch.testing.assert_close(model(x), _mixing(model, _values(3, 4), None, None))


class _GivesParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(_values(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight


def _edited_truth(site: str, x: Tensor) -> Tensor:
    truth = _whole()
    truth.get_submodule(site).register_forward_hook(
        lambda module, args, out: _mixing(module, out, None, None)
    )
    return truth(x)


def _same_as_one_process(model: nn.Module, site: str, x: Tensor, what: str) -> None:
    records: Records = {}
    with FlexModel(model, records, 2, keep="all") as flex:
        flex.register_forward_hook(HookFunction(site, editing_function=_mixing))
        for _ in range(2):
            out = flex(x)
            torch.testing.assert_close(out, _edited_truth(site, x), msg=lambda m: f"{what}: {m}")
    truth = _whole()
    due = truth[0](x) if site == "0" else truth(x)
    torch.testing.assert_close(records[site][1], due, msg=lambda m: f"{what}: {m}")


def test_fault_13_outputs_that_were_ignored() -> None:
    run_ranks(_fault_13, 2)


# -- 14, 15, 16: records, and ranks that are not alike -----------------------------------------


def test_fault_14_the_record_was_the_live_tensor() -> None:
    records: Records = {}
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
    with FlexModel(model, records) as flex:
        flex.register_forward_hook(HookFunction("0"))
        flex(-torch.ones(3))
    assert torch.equal(records["0"][0], -torch.ones(3))


def _fault_15() -> list[str]:
    records: Records = {}
    with FlexModel(_sharded(), records, 2) as model:
        forward, backward = HookFunction("0"), HookFunction("0")
        model.register_forward_hook(forward)
        model.register_full_backward_hook(backward)
        keys = [model.record_key(forward), model.record_key(backward)]
        model(_values(BATCH, WIDTH).requires_grad_()).sum().backward()
        assert keys[0] != keys[1]
    if dist.get_rank() == 0:
        assert [len(records[key]) for key in keys] == [1, 1]
    return sorted(records)


def test_fault_15_forward_and_backward_shared_a_list_and_every_rank_kept_all() -> None:
    first, second = run_ranks(_fault_15, 2)
    assert len(first) == 2
    assert second == []


def _fault_16_groups() -> None:
    """Two models of two ranks; neither rank 2 nor rank 3 is in a group with rank 0."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = dist.get_rank() // 2
    shard = _values(4, 6, seed=pair).chunk(2, 1)[dist.get_rank() % 2]
    model = FlexModel(nn.Sequential(nn.Identity()), {}, 2, process_group=pairs[pair])
    with model:
        torch.manual_seed(dist.get_rank())
        probe = nn.Linear(6, 6)
        model.register_trainable_module("probe", probe)
        model.register_forward_hook(
            HookFunction("0", None, lambda m, x, s, modules: x * 2, placements={"tp": Shard(1)})
        )
        assert torch.equal(model(shard), shard * 2)
    weights = [torch.empty_like(probe.weight) for _ in range(2)]
    dist.all_gather(weights, probe.weight.detach(), group=pairs[pair])
    assert torch.equal(*weights)


def test_fault_16_a_broadcast_from_rank_0_to_groups_without_it() -> None:
    run_ranks(_fault_16_groups, 4)


def _fault_16_ragged(sizes: tuple[int, int]) -> None:
    rank = dist.get_rank()
    x, weight = _values(BATCH, WIDTH), _values(BATCH, WIDTH, seed=5)
    for edit in (None, _mixing, _probing):
        due_out, due_grad, due_probe = _truth(edit, dp=2)
        probe, records = _probe(), {}
        with FlexModel(_whole(), records, data_parallel_size=2) as model:
            model.register_trainable_module("probe", probe)
            model.register_forward_hook(HookFunction("0", editing_function=edit))
            for _ in range(2):
                probe.zero_grad()
                part = x.split(sizes)[rank].clone().requires_grad_()
                out = model(part)
                (out * weight.split(sizes)[rank]).sum().backward()
                torch.testing.assert_close(out, due_out.split(sizes)[rank])
                torch.testing.assert_close(part.grad, due_grad.split(sizes)[rank] * 2)
            if edit is _probing:
                torch.testing.assert_close(probe.weight.grad, due_probe.weight.grad)
        if rank == 0:
            torch.testing.assert_close(records["0"][0], _whole()[0](x))


@pytest.mark.parametrize("sizes", [(4, 2), (1, 5), (3, 3), (6, 0), (0, 6)])
def test_fault_16_ragged_batches_killed_the_process(sizes: tuple[int, int]) -> None:
    run_ranks(_fault_16_ragged, 2, sizes, timeout=15)


# -- 17: the wrapper as a module ---------------------------------------------------------------


def test_fault_17_named_children_of_a_sequential() -> None:
    inner = nn.Sequential()
    inner.add_module("layer", nn.Linear(2, 2))
    model = nn.Sequential()
    model.add_module("inner", inner)
    records: Records = {}
    with FlexModel(model, records) as flex:
        flex.register_forward_hook(HookFunction("inner.layer"))
        flex(torch.ones(1, 2))
    assert list(records) == ["inner.layer"]


def test_fault_17_no_generate() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    llama = LlamaForCausalLM(config).eval()
    prompt = torch.tensor([[1, 2]])
    due = llama.generate(prompt, max_new_tokens=2, do_sample=False)
    records: Records = {}
    with FlexModel(llama, records) as model:
        model.register_forward_hook(HookFunction("model.layers.0.self_attn"))
        assert torch.equal(model.generate(prompt, max_new_tokens=2, do_sample=False), due)
    assert len(records["model.layers.0.self_attn"]) == 2


def test_fault_17_deepcopy_failed_and_hooks_could_not_be_registered_again() -> None:
    hook = HookFunction("0", editing_function=_mixing)
    flex = FlexModel(_whole(), {})
    flex.register_forward_hook(hook)
    x = torch.ones(2, WIDTH)
    edited = flex(x)
    assert torch.equal(copy.deepcopy(flex)(x), edited)
    model = flex.restore()
    again = FlexModel(model, {})
    again.register_forward_hook(hook)
    assert torch.equal(again(x), edited)


class _TakesGroups(nn.Module):
    def forward(self, x: Tensor, groups: int = 1) -> Tensor:
        return x * groups


def test_fault_17_the_wrapped_models_own_keyword_was_swallowed() -> None:
    records: Records = {}
    with FlexModel(_TakesGroups(), records) as model:
        model.register_forward_hook(HookFunction(""))
        assert model(torch.ones(1)).item() == 1
        assert model(torch.ones(1), groups=3).item() == 3
    assert [record.item() for record in records[""]] == [1, 3]
