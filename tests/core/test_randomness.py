"""Random edits: alike on every rank, new at every call, and no one else's business."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import (
    INNER,
    WIDTH,
    Ways,
    batch,
    close,
    one_process_loss,
    plain_gradients,
    ways,
    whole,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flex_model import FlexModel, HookFunction
from flex_model.errors import RecomputeError
from flex_model.testing.ranks import run_ranks

Records = dict[str, list[Tensor]]


def _noisy(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    dropped = nn.functional.dropout(x, 0.3, training=True)
    return dropped + torch.randn_like(x) + torch.rand(x.shape[-1]) + torch.bernoulli(x.sigmoid())


def _noise_alone(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return torch.rand_like(x)


def _noise(calls: int = 1, name: str = "0", hooks: int = 1, **options: Any) -> list[Tensor]:
    """What ``rand_like`` gives in some calls of a FlexModel of one process."""
    with FlexModel(nn.Sequential(nn.Identity(), nn.Identity()), {}, **options) as model:
        for _ in range(hooks):
            model.register_forward_hook(HookFunction(name, editing_function=_noise_alone))
        return [model(torch.zeros(64)) for _ in range(calls)]


# -- one process -------------------------------------------------------------------------------


def test_calls_differ_from_each_other() -> None:
    """Catches one seed for every call: noise that is the same in each step trains nothing."""
    noise = _noise(calls=5)
    assert all(not torch.equal(a, b) for i, a in enumerate(noise) for b in noise[:i])


def test_hook_points_and_edits_in_a_chain_differ() -> None:
    """Catches a stream that two hooks share: their noise would be correlated."""
    assert not torch.equal(_noise(name="0")[0], _noise(name="1")[0])
    seen: list[Tensor] = []

    def keep(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
        seen.append(torch.rand_like(x))
        return x

    with FlexModel(nn.Sequential(nn.Identity()), {}) as model:
        for _ in range(3):
            model.register_forward_hook(HookFunction("0", editing_function=keep))
        model(torch.zeros(64))
    assert len({tensor[0].item() for tensor in seen}) == 3


def test_reproducible_from_the_seed() -> None:
    """Catches noise that depends on what ran before, or on the process."""
    torch.manual_seed(1)
    first = _noise(calls=3, seed=5)
    torch.manual_seed(2)
    torch.rand(17)
    assert all(torch.equal(a, b) for a, b in zip(first, _noise(calls=3, seed=5), strict=True))
    assert not torch.equal(first[0], _noise(seed=6)[0])
    for seed in (-1, 0, 2**63, 2**70):
        assert _noise(seed=seed)[0].isfinite().all()


def test_the_noise_is_noise() -> None:
    """Catches a stream that repeats itself, or neighbouring seeds that are alike."""
    noise = torch.stack([*_noise(calls=64), *_noise(calls=64, seed=1)])
    assert abs(noise.mean().item() - 0.5) < 0.02
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() < 0.65


class Drops(nn.Module):
    """Random itself, before and after what is hooked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        before = torch.rand(3)
        self.inner(x)
        return torch.cat([before, torch.rand(3)])


def _fails(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    torch.rand(5)
    raise KeyError("from the edit")


@pytest.mark.parametrize("edit", [_noisy, _noise_alone, _fails, None])
def test_the_models_own_stream_is_as_it_was(edit: Callable[..., Tensor] | None) -> None:
    """Catches a dropout mask that changes because a hook was registered; an error in the edit puts
    the stream back too.
    """
    model = Drops()
    torch.manual_seed(3)
    due, state = model(torch.ones(4)), torch.get_rng_state()
    with FlexModel(model, {}) as flex:
        flex.register_forward_hook(HookFunction("inner", editing_function=edit))
        torch.manual_seed(3)
        if edit is _fails:
            before = torch.rand(3)
            torch.manual_seed(3)
            with pytest.raises(KeyError):
                flex(torch.ones(4))
            assert torch.equal(torch.cat([before, torch.rand(3)]), due)
        else:
            assert torch.equal(flex(torch.ones(4)), due)
        assert torch.equal(torch.get_rng_state(), state)


def test_registering_draws_nothing() -> None:
    """Catches a wrapper whose making moves the stream on."""
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with FlexModel(Drops(), {}) as model:
        model.register_forward_hook(HookFunction("inner", editing_function=_noisy))
        model.register_trainable_module("probe", nn.Identity())
    assert torch.equal(torch.get_rng_state(), state)


# -- recompute ---------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Blocks that are run again in backward, or not at all so for the truth."""

    def __init__(self, blocks: nn.Sequential, how: bool | None, times: int = 1) -> None:
        super().__init__()
        self.blocks = blocks
        self.how = how
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            for block in self.blocks:
                x = block(x) if self.how is None else checkpoint(block, x, use_reentrant=self.how)
        return x


SITES = ("blocks.0.norm", "blocks.0.up", "blocks.0.act", "blocks.1.down", "blocks.1")


def _step(
    how: bool | None, edit: Any, seeds: tuple[int, ...] = (1,), times: int = 1
) -> tuple[list[Tensor], dict[str, Tensor], Records]:
    """Input gradients, weight gradients and records of some microbatches, one backward for all."""
    records: Records = {}
    model = Checkpointed(whole(layers=2), how, times)
    with FlexModel(model, records, seed=4) as flex:
        for site in SITES:
            flex.register_forward_hook(HookFunction(site, editing_function=edit))
        inputs = [batch(seed) for seed in seeds]
        torch.stack([flex(x).pow(2).sum() for x in inputs]).sum().backward()
    grads = [x.grad for x in inputs if x.grad is not None]
    return grads, plain_gradients(model), records


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("edit", [None, _noisy])
@pytest.mark.parametrize("seeds", [(1,), (1, 2), (2, 2)], ids=["one", "two", "the same twice"])
def test_a_recompute_meets_the_same_noise_and_is_not_recorded(
    reentrant: bool, edit: Any, seeds: tuple[int, ...]
) -> None:
    """Catches gradients of another function than the forward's, and records of the recompute; two
    microbatches may hold the same values and still have noise of their own.
    """
    due_inputs, due_weights, due_records = _step(None, edit, seeds)
    inputs, weights, records = _step(reentrant, edit, seeds)
    for x, due in zip(inputs, due_inputs, strict=True):
        close(x, due, "input gradient")
    for name, due in due_weights.items():
        close(weights[name], due, name)
    assert records.keys() == due_records.keys()
    for site, tensors in due_records.items():
        assert len(records[site]) == len(tensors), f"{site} is recorded by the recompute too"
        assert all(torch.equal(a, b) for a, b in zip(records[site], tensors, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_run_twice_in_one_forward_keeps_its_two_draws_apart(reentrant: bool) -> None:
    """Catches a recompute that takes the other call's noise."""
    due = _step(None, _noisy, times=2)
    found = _step(reentrant, _noisy, times=2)
    close(found[0][0], due[0][0], "input gradient")
    for name, grad in due[1].items():
        close(found[1][name], grad, name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_microbatches_that_differ_in_one_token_keep_their_draws_apart(reentrant: bool) -> None:
    """Catches calls told apart by a few of their values only: prompts often share a prefix."""

    def step(how: bool | None) -> list[Tensor]:
        model = Checkpointed(nn.Sequential(nn.Linear(4, 4)), how)
        with torch.no_grad():
            model.blocks[0].weight.copy_(torch.eye(4))
        with FlexModel(model, {}, seed=4) as flex:
            edit = HookFunction(
                "blocks.0",
                editing_function=lambda module, x, save_ctx, modules: x * torch.randn_like(x),
            )
            flex.register_forward_hook(edit)
            first = torch.ones(2, 64, 4, requires_grad=True)
            second = torch.ones(2, 64, 4)
            second[0, 1] = 5.0
            second.requires_grad_()
            torch.stack([flex(x).sum() for x in (first, second)]).sum().backward()
        return [x.grad for x in (first, second) if x.grad is not None]

    for found, due in zip(step(reentrant), step(None), strict=True):
        close(found, due, "input gradient")


def test_noise_that_cannot_be_repeated_is_refused() -> None:
    """Catches other noise in the recompute than in the forward: a silently wrong gradient."""

    class Unsteady(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            steps = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            return steps(lambda y: self.inner(nn.functional.dropout(y, 0.5)).pow(2), x)

    with FlexModel(Unsteady(), {}) as model:
        model.register_forward_hook(HookFunction("inner", editing_function=_noisy))
        torch.manual_seed(0)
        out = model(torch.ones(64, requires_grad=True))
        with pytest.raises(RecomputeError, match=r"inner .*recompute.*preserve_rng_state"):
            out.sum().backward()


def test_a_deterministic_edit_may_be_recomputed_on_anything() -> None:
    """Catches a refusal where no random number is drawn."""

    class Unsteady(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            steps = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            return steps(lambda y: self.inner(nn.functional.dropout(y, 0.5)).pow(2), x)

    with FlexModel(Unsteady(), {}) as model:
        model.register_forward_hook(
            HookFunction("inner", editing_function=lambda module, x, save_ctx, modules: x * 2)
        )
        model(torch.ones(64, requires_grad=True)).sum().backward()


# -- ranks -------------------------------------------------------------------------------------


def _same_everywhere() -> list[list[Tensor]]:
    """Outputs and records of random edits, on ranks whose seeds differ."""
    found = []
    for way in ways():
        for site in ("0.norm", "0.up", "0.act", "0.down", "0"):
            model = way.model()
            torch.manual_seed(100 + dist.get_rank())
            state = torch.get_rng_state()
            with way.flex(model, {}, seed=8) as flex:
                flex.register_forward_hook(HookFunction(site, editing_function=_noisy))
                outs = [flex(way.leaf()).detach() for _ in range(3)]
            assert torch.equal(torch.get_rng_state(), state), "each rank's stream is its own"
            found.append(outs)
    return found


def test_ranks_draw_alike_whatever_their_seeds() -> None:
    """Catches dropout that keeps other entries on each rank: flex-model 0.1.0's error was 3.3."""
    due = []
    for _ in ("tp", "dp"):
        for site in ("0.norm", "0.up", "0.act", "0.down", "0"):
            with FlexModel(whole(), {}, seed=8) as flex:
                flex.register_forward_hook(HookFunction(site, editing_function=_noisy))
                due.append([flex(batch()).detach() for _ in range(3)])
    by_rank = run_ranks(_same_everywhere, 2)
    sites = len(due) // 2
    for at, outs in enumerate(due):
        for call, out in enumerate(outs):
            for rank in range(2):
                part = out if at < sites else out.chunk(2)[rank]
                close(by_rank[rank][at][call], part, f"site {at}, call {call}, rank {rank}")


def _recomputed(how: bool | None, way: Ways) -> tuple[dict[str, Tensor], Tensor | None]:
    model = Checkpointed(way.model(layers=2), how)
    torch.manual_seed(100 + dist.get_rank())
    records: Records = {}
    with way.flex(model, records, keep="all", seed=4) as flex:
        for site in SITES:
            flex.register_forward_hook(HookFunction(site, editing_function=_noisy))
        x = way.leaf()
        way.loss(flex(x)).backward()
    assert all(len(tensors) == 1 for tensors in records.values()), (way.name, how)
    return way.gradients(model), x.grad


def _recompute_on_ranks() -> None:
    for way in ways():
        model, x = Checkpointed(whole(layers=2), None), batch()
        with _alone(model) as truth:
            one_process_loss(truth(x), way).backward()
        for how in (None, True, False):
            grads, input_grad = _recomputed(how, way)
            what = f"{way.name}, reentrant={how}"
            close(input_grad, way.input_gradient(x.grad), f"input gradient, {what}")
            for name, due in plain_gradients(model).items():
                close(grads[name], due, f"{name}, {what}")


def _alone(model: nn.Module) -> FlexModel:
    """One process with the same edits, on a rank of two: a mesh of this rank alone."""
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    flex = FlexModel(model, {}, process_group=alone, seed=4)
    for site in SITES:
        flex.register_forward_hook(HookFunction(site, editing_function=_noisy))
    return flex


def test_a_recompute_on_ranks_meets_the_same_noise() -> None:
    """Catches a recompute whose collectives or noise go another way on some rank."""
    run_ranks(_recompute_on_ranks, 2)


def test_sizes_are_told_apart() -> None:
    """Catches a model in which a swapped dim would not show."""
    assert WIDTH != INNER
