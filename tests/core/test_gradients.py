"""Gradients through hooks on two ranks, against one process under torch's own hooks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import (
    INNER,
    WIDTH,
    Edit,
    Ways,
    batch,
    close,
    one_process_loss,
    plain_gradients,
    probe,
    ways,
    whole,
)
from torch import Tensor, nn

from flex_model import FlexModel, HookFunction
from flex_model.errors import GradientPlacementError, RankDisagreementError
from flex_model.testing.ranks import run_ranks

# Every place a value can lie: replicated (its gradient whole), sharded, summed, the module's own.
SITES = {"0.norm": WIDTH, "0.up": INNER, "0.act": INNER, "0.down": WIDTH, "0": WIDTH}

Records = dict[str, list[Tensor]]


def _same(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x


def _times_one(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x * 1


def _in_place(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x.mul_(x.detach().softmax(-1)).add_(0.5)


def _mixing(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    """Batch and channels mixed, so a term lost between ranks shows."""
    return x * (1 + x.softmax(-1)) + x.roll(1, 0) * 0.5 + x.mean()


def _probed(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x.roll(1, 0) + modules["probe"](x)


def _one_process(
    site: str, edit: Edit, way: Ways
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Output, input gradient, weight gradients and the probe's gradients under a raw hook."""
    model, trained, x = whole(), probe(SITES[site]), batch()
    model.get_submodule(site).register_forward_hook(
        lambda module, args, out: edit(module, out.clone(), None, {"probe": trained})
    )
    out = model(x)
    one_process_loss(out, way).backward()
    assert x.grad is not None
    return out.detach(), x.grad, plain_gradients(model), plain_gradients(trained)


def _on_ranks(site: str, edit: Edit, way: Ways, flex: FlexModel) -> None:
    """The same through a FlexModel, compared."""
    what = f"{way.name}, {site}, {edit.__name__}"
    due_out, due_input, due_weights, due_probe = _one_process(site, edit, way)
    trained, x = probe(SITES[site]), way.leaf()
    flex.module.zero_grad()
    flex.trainable_modules.clear()
    flex.register_trainable_module("probe", trained)
    flex.register_forward_hook(HookFunction(site, editing_function=edit))
    out = flex(x)
    way.loss(out).backward()
    close(out, way.part(due_out), f"output, {what}")
    close(x.grad, way.input_gradient(due_input), f"input gradient, {what}")
    weights = way.gradients(flex.module)
    assert weights.keys() == due_weights.keys(), what
    for name, grad in weights.items():
        close(grad, due_weights[name], f"gradient of {name}, {what}")
    found = plain_gradients(trained)
    assert found.keys() == due_probe.keys(), what
    for name, grad in found.items():
        close(grad, due_probe[name], f"gradient of the probe's {name}, {what}")
        other = grad.clone()
        dist.broadcast(other, 0)
        assert torch.equal(grad, other), f"the ranks' probes drift apart, {what}"


def _edits(edits: list[Edit]) -> None:
    for way in ways():
        for site in SITES:
            for edit in edits:
                with way.flex(way.model(), {}) as flex:
                    _on_ranks(site, edit, way, flex)


@pytest.mark.parametrize(
    "edits", [[_same, _times_one], [_in_place], [_mixing], [_probed]], ids=lambda e: e[0].__name__
)
def test_edits_have_the_gradients_of_one_process(edits: list[Edit]) -> None:
    """Catches the field's classic: an upstream gradient of zero, or a rank's own term in place of
    the whole; and edits in place, whose gradient is lost if the shard itself was changed.
    """
    run_ranks(_edits, 2, edits)


def _retrieval() -> None:
    for way in ways():
        model = way.model()
        x = way.leaf()
        way.loss(model(x)).backward()
        due = x.grad, plain_gradients(model)
        for site in SITES:
            for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
                records: Records = {}
                with way.flex(model, records) as flex:
                    getattr(flex, f"register_{kind}_hook")(HookFunction(site))
                    for _ in range(2):
                        model.zero_grad()
                        y = way.leaf()
                        way.loss(flex(y)).backward()
                        assert torch.equal(y.grad, due[0]), (way.name, site, kind)
                        for name, grad in plain_gradients(model).items():
                            assert torch.equal(grad, due[1][name]), (way.name, site, kind, name)
                assert len(records.get(site, [])) == (2 if dist.get_rank() == 0 else 0)


def test_a_hook_that_only_retrieves_changes_nothing() -> None:
    """Catches a gather on the way of the value: every gradient is the same to the bit."""
    run_ranks(_retrieval, 2)


def _pre_hooks() -> None:
    for way in ways():
        for site in ("0.norm", "0.up", "0.down"):
            width = WIDTH if site != "0.down" else INNER
            model, x = whole(), batch()
            model.get_submodule(site).register_forward_pre_hook(
                lambda module, args: (_mixing(module, args[0], None, None),)
            )
            one_process_loss(model(x), way).backward()
            with way.flex(way.model(), {}) as flex:
                flex.register_forward_pre_hook(HookFunction(site, None, _mixing))
                y = way.leaf()
                way.loss(flex(y)).backward()
                what = f"{way.name}, before {site} of width {width}"
                close(y.grad, way.input_gradient(x.grad), f"input gradient, {what}")
                for name, grad in way.gradients(flex.module).items():
                    close(grad, plain_gradients(model)[name], f"{name}, {what}")


def test_edits_of_inputs() -> None:
    """Catches a pre-hook that takes the input's layout for the output's."""
    run_ranks(_pre_hooks, 2)


def _backward_edit(module: nn.Module, grad: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return grad.roll(1, 0) + 0.1 * grad.softmax(-1)


def _backward_hooks() -> None:
    for way in ways():
        for site in SITES:
            for kind in ("full_backward", "full_backward_pre"):
                seen: list[Tensor] = []
                model, x = whole(), batch()
                _raw_backward_hook(model.get_submodule(site), kind, seen)
                one_process_loss(model(x), way).backward()
                records: Records = {}
                with way.flex(way.model(), records, keep="all") as flex:
                    hook = HookFunction(site, None, _backward_edit)
                    getattr(flex, f"register_{kind}_hook")(hook)
                    y = way.leaf()
                    way.loss(flex(y)).backward()
                    what = f"{way.name}, {kind} of {site}"
                    close(records[site][0], seen[0], f"record, {what}")
                    close(y.grad, way.input_gradient(x.grad), f"input gradient, {what}")
                    for name, grad in way.gradients(flex.module).items():
                        close(grad, plain_gradients(model)[name], f"{name}, {what}")


def _raw_backward_hook(module: nn.Module, kind: str, seen: list[Tensor]) -> None:
    def visit(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(grads[0].clone())
        return (_backward_edit(module, grads[0], None, None), *grads[1:])

    if kind == "full_backward":
        module.register_full_backward_hook(lambda m, grad_input, grad_output: visit(grad_input))
    else:
        module.register_full_backward_pre_hook(lambda m, grad_output: visit(grad_output))


def test_backward_hooks_see_and_edit_the_gradient_of_the_one_loss() -> None:
    """Catches a rank's own gradient shown as the whole, and factors of the number of ranks."""
    run_ranks(_backward_hooks, 2)


def _parameter_hooks() -> None:
    for way in ways():
        for name in ("0.up.weight", "0.down.weight", "0.norm.weight", "0.down.bias"):
            model, x, seen = whole(), batch(), []
            model.get_parameter(name).register_hook(
                lambda grad, seen=seen: (seen.append(grad.clone()), grad * 2 + 1)[1]
            )
            one_process_loss(model(x), way).backward()
            records: Records = {}
            with way.flex(way.model(), records, keep="all") as flex:
                flex.register_hook(
                    HookFunction(name, None, lambda module, grad, save_ctx, modules: grad * 2 + 1)
                )
                way.loss(flex(way.leaf())).backward()
                close(records[name][0], seen[0], f"{way.name}, gradient of {name}")
                close(
                    way.gradients(flex.module)[name],
                    model.get_parameter(name).grad,
                    f"{way.name}, edited gradient of {name}",
                )


def test_hooks_on_parameters() -> None:
    """Catches a parameter's shard of a gradient, or one rank's, shown as the whole."""
    run_ranks(_parameter_hooks, 2)


# -- losses on gathered tensors ----------------------------------------------------------------


def _storing(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    save_ctx.seen = x
    return x


def _extra_loss(seen: Tensor) -> Tensor:
    return (seen.softmax(-1) * seen.roll(1, 0)).pow(2).sum()


def _loss_on_what_was_stored(site: str) -> None:
    for way in ways():
        model, x, seen = whole(), batch(), []
        model.get_submodule(site).register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(out)
        )
        out = model(x)
        # One process: the mean of the ranks' losses, each of which has the whole extra term.
        (one_process_loss(out, way) + _extra_loss(seen[0])).backward()
        with way.flex(way.model(), {}) as flex:
            flex.register_forward_hook(HookFunction(site, editing_function=_storing))
            for _ in range(2):
                flex.module.zero_grad()
                y = way.leaf()
                loss = way.loss(flex(y)) + _extra_loss(flex.save_ctx.seen)
                loss.backward()
                what = f"{way.name}, a loss on {site}"
                close(y.grad, way.input_gradient(x.grad), f"input gradient, {what}")
                for name, grad in way.gradients(flex.module).items():
                    close(grad, plain_gradients(model)[name], f"{name}, {what}")


@pytest.mark.parametrize("site", SITES)
def test_a_loss_on_a_stored_tensor(site: str) -> None:
    """Catches a term built on a whole activation that is counted once per rank, or by its slice."""
    run_ranks(_loss_on_what_was_stored, 2, site)


def _loss_of_the_stored_alone() -> None:
    for way in ways():
        for site in ("0.up", "0.act"):
            model, x, seen = whole(), batch(), []
            model.get_submodule(site).register_forward_hook(
                lambda module, args, out, seen=seen: seen.append(out)
            )
            model(x)
            _extra_loss(seen[0]).backward()
            with way.flex(way.model(), {}) as flex:
                flex.register_forward_hook(HookFunction(site, editing_function=_storing))
                y = way.leaf()
                flex(y)
                _extra_loss(flex.save_ctx.seen).backward()
                close(y.grad, way.input_gradient(x.grad), f"{way.name}, {site} alone")


def test_a_loss_of_a_stored_tensor_alone() -> None:
    """Catches a gradient that is only whole where one came through the module's output too."""
    run_ranks(_loss_of_the_stored_alone, 2)


def _undecided() -> str:
    way = ways()[0]
    with way.flex(way.model(), {}) as flex:
        flex.register_forward_hook(HookFunction("0.norm", editing_function=_storing))
        flex(way.leaf())
        with pytest.raises(GradientPlacementError) as caught:
            _extra_loss(flex.save_ctx.seen).backward()
    return str(caught.value)


def test_a_gradient_that_nothing_decides_is_refused_by_name() -> None:
    """Catches a guess whether the ranks hold a replicated value's gradient whole or in terms."""
    for message in run_ranks(_undecided, 2):
        assert "0.norm" in message
        assert "tp" in message
        assert "gradients=" in message


def _loss_on_one_rank() -> list[str]:
    told = []
    for way in ways():
        with way.flex(way.model(), {}) as flex:
            flex.register_forward_hook(HookFunction("0.up", editing_function=_storing))
            out = flex(way.leaf())
            loss = way.loss(out)
            if dist.get_rank() == 1:
                loss = loss + _extra_loss(flex.save_ctx.seen)
            loss.backward()
            with pytest.raises(RankDisagreementError) as caught:
                flex(way.leaf())
            told.append(str(caught.value))
    return told


def test_a_loss_on_one_rank_only_is_told_at_the_next_forward() -> None:
    """Catches a term that one rank has and the others miss: silently a part of the gradient."""
    for told in run_ranks(_loss_on_one_rank, 2):
        for message in told:
            assert "must be computed on every rank" in message
            assert "rank 0: 0, rank 1: 1" in message


# -- the turns of a training run ---------------------------------------------------------------


def _first_backward_without_a_gradient() -> None:
    for way in ways():
        for site in ("0.norm", "0.up", "0.down"):
            with way.flex(way.model(), {}) as flex:
                hook = HookFunction(site, editing_function=_mixing)
                flex.register_forward_hook(hook)
                with torch.no_grad():
                    flex(way.leaf())
                zero = way.leaf()
                (flex(zero) * 0).sum().backward()
                assert not zero.grad.count_nonzero()
                flex.module.zero_grad()
                y = way.leaf()
                way.loss(flex(y)).backward()
                due = _one_process(site, _mixing, way)
                what = f"{way.name}, {site}, after a backward of zeros"
                close(y.grad, way.input_gradient(due[1]), what)
                for name, grad in way.gradients(flex.module).items():
                    close(grad, due[2][name], f"{name}, {what}")


def test_a_first_backward_that_brings_nothing_decides_nothing() -> None:
    """Catches placements settled on an empty or zero gradient, and kept for every later one."""
    run_ranks(_first_backward_without_a_gradient, 2)


def _accumulated() -> None:
    for way in ways():
        model, trained = whole(), probe(INNER)
        model.get_submodule("0.up").register_forward_hook(
            lambda module, args, out, trained=trained: _probed(
                module, out, None, {"probe": trained}
            )
        )
        for seed in (1, 2):
            one_process_loss(model(batch(seed)), way).backward()
        with way.flex(way.model(), {}) as flex:
            other = probe(INNER)
            flex.register_trainable_module("probe", other)
            flex.register_forward_hook(HookFunction("0.up", editing_function=_probed))
            for seed in (1, 2):
                way.loss(flex(way.leaf(seed))).backward()
            for name, grad in way.gradients(flex.module).items():
                close(grad, plain_gradients(model)[name], f"{way.name}, {name}")
            for name, grad in plain_gradients(other).items():
                close(grad, plain_gradients(trained)[name], f"{way.name}, probe's {name}")


def test_gradients_add_up_over_microbatches() -> None:
    """Catches a reduction that takes in what an earlier microbatch left."""
    run_ranks(_accumulated, 2)


def _frozen() -> None:
    for way in ways():
        model, trained = whole().requires_grad_(False), probe(INNER)
        model.get_submodule("0.up").register_forward_hook(
            lambda module, args, out, trained=trained: trained(out)
        )
        one_process_loss(model(batch().detach()), way).backward()
        sharded = way.model().requires_grad_(False)
        with way.flex(sharded, {}) as flex:
            other = probe(INNER)
            flex.register_trainable_module("probe", other)
            flex.register_forward_hook(
                HookFunction(
                    "0.up",
                    editing_function=lambda module, x, save_ctx, modules: modules["probe"](x),
                )
            )
            way.loss(flex(way.leaf().detach())).backward()
            for name, grad in plain_gradients(other).items():
                close(grad, plain_gradients(trained)[name], f"{way.name}, probe's {name}")


def test_a_probe_in_a_frozen_model() -> None:
    """Catches a re-shard that builds no graph because the activation itself needs none."""
    run_ranks(_frozen, 2)


def _trained(steps: int) -> None:
    for way in ways():
        model, trained = whole(), probe(INNER)
        model.get_submodule("0.act").register_forward_hook(
            lambda module, args, out, trained=trained: _probed(
                module, out, None, {"probe": trained}
            )
        )
        optimizer = torch.optim.SGD([*model.parameters(), *trained.parameters()], lr=0.01)
        with way.flex(way.model(), {}) as flex:
            other = probe(INNER)
            flex.register_trainable_module("probe", other)
            flex.register_forward_hook(HookFunction("0.act", editing_function=_probed))
            ours = torch.optim.SGD(flex.parameters(), lr=0.01)
            for seed in range(steps):
                optimizer.zero_grad()
                one_process_loss(model(batch(seed)), way).backward()
                optimizer.step()
                ours.zero_grad()
                way.loss(flex(way.leaf(seed))).backward()
                if way.is_dp:
                    for parameter in flex.module.parameters():
                        dist.all_reduce(parameter.grad)
                        parameter.grad /= 2
                ours.step()
            for name, parameter in other.named_parameters():
                close(parameter, trained.get_parameter(name), f"{way.name}, probe's {name}")
            for name in ("0.up.weight", "0.down.weight", "0.norm.bias"):
                close(flex.get_module_parameter(name), model.get_parameter(name), name)


def test_three_steps_of_training() -> None:
    """Catches errors that a single step hides, and an optimizer that misses the probe."""
    run_ranks(_trained, 2, 3)


def _called_twice(make: Callable[[], Ways]) -> None:
    way = make()

    class Shared(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x) * 0.5)

    model, x = Shared(whole()[0]), batch()
    model.layer.up.register_forward_hook(lambda module, args, out: _mixing(module, out, None, None))
    one_process_loss(model(x), way).backward()
    with way.flex(Shared(way.model()[0]), {}) as flex:
        flex.register_forward_hook(HookFunction("layer.up", editing_function=_mixing))
        y = way.leaf()
        way.loss(flex(y)).backward()
        close(y.grad, way.input_gradient(x.grad), f"{way.name}, a layer called twice")
        for name, grad in way.gradients(flex.module).items():
            close(grad, plain_gradients(model)[name], f"{way.name}, {name}")


def _tensor_way() -> Ways:
    return ways()[0]


def _data_way() -> Ways:
    return ways()[1]


@pytest.mark.parametrize("make", [_tensor_way, _data_way])
def test_a_layer_called_twice(make: Callable[[], Ways]) -> None:
    """Catches state kept per module where it belongs to the call."""
    run_ranks(_called_twice, 2, make)


def _gradient_penalty() -> None:
    way = ways()[1]
    model, x = whole(), batch()
    model[0].up.register_forward_hook(lambda module, args, out: _mixing(module, out, None, None))
    (grad,) = torch.autograd.grad(one_process_loss(model(x), way), x, create_graph=True)
    # A rank's own gradient is twice its slice; the mean over two ranks of their squares is this.
    (2 * grad.pow(2).sum()).backward()
    with way.flex(way.model(), {}) as flex:
        flex.register_forward_hook(HookFunction("0.up", editing_function=_mixing))
        y = way.leaf()
        (own,) = torch.autograd.grad(way.loss(flex(y)), y, create_graph=True)
        close(own, way.input_gradient(grad.detach()), "first derivative")
        own.pow(2).sum().backward()
        for name, found in way.gradients(flex.module).items():
            close(found, plain_gradients(model)[name], f"second derivative, {name}")


def test_a_penalty_on_the_gradient() -> None:
    """Catches a double backward that leaves out what other ranks' samples add through the edit."""
    run_ranks(_gradient_penalty, 2)
