"""Every hook on row-parallel layers: one process's result on every rank, nothing moved in vain."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from golden_cases import GOLDEN, cases
from row_parallel import (
    CALLS,
    FRAMEWORKS,
    HOOKS,
    INPUTS,
    OUTPUTS,
    Scores,
    own_channels,
    row_parallel,
    run,
    truth,
    values,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from flex_model.importance import (
    L2NormHook,
    LayerNormContributionHook,
    MegatronL2NormHook,
)
from flex_model.testing.ranks import run_ranks
from traffic import Counting

RANKS = (2, 4)


def _same(found: dict[str, Any], due: dict[str, Any], where: str) -> None:
    """Scores within 1e-5 (row-parallel sums are added up in another order), ranks exactly."""
    assert sorted(found) == sorted(due), where
    for name, value in due.items():
        if isinstance(value, Tensor):
            error = (found[name].double() - value.double()).abs()
            assert (error <= 1e-6 + 1e-5 * value.double().abs()).all(), f"{where} {name}: {error}"
        else:
            assert found[name] == value, f"{where} {name}"


def _all_hooks(framework: str) -> dict[str, Scores]:
    inputs = [own_channels(x) for x in values()[2]]
    with row_parallel(framework) as layer:
        return {name: run(make(layer), inputs, layer) for name, make in HOOKS.items()}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_hook_equals_one_process(framework: str, ranks: int) -> None:
    """Scores and state of the whole layer, on every rank; the state is told by its values too."""
    due = {name: truth(name) for name in HOOKS}
    for rank, found in enumerate(run_ranks(_all_hooks, ranks, framework)):
        for name, scores in found.items():
            where = f"{name} on rank {rank}"
            _same(scores.result, due[name].result, where)
            _same(scores.state, due[name].state, f"{where}, state")


def _traffic(framework: str) -> dict[str, list[tuple[str, int | None]]]:
    inputs = [own_channels(x) for x in values()[2]]
    found = {}
    with row_parallel(framework) as layer:
        for name, make in HOOKS.items():
            if name == "kv heads < ranks":
                continue
            hook = make(layer)
            calls = []
            for given in inputs:
                output = layer(given)
                with Counting() as counting:
                    hook(layer, (given,), output)
                calls += [*counting.seen.elements()]
            with Counting() as counting:
                hook.accumulate()
            found[name] = calls
            found[f"{name}, in the end"] = [*counting.seen.elements()]
    return found


@pytest.mark.parametrize("ranks", RANKS)
def test_nothing_of_the_activation_is_moved(ranks: int) -> None:
    """By hand: nothing per call; in the end a vector. Iterative: what its formula needs."""
    schedule = [5, 5, 5, 5, 4]
    tokens = [(6 + call) * 3 for call in range(CALLS)]
    # A ring all-reduce of [tokens, outputs] once something is pruned; one vector of all channels.
    sums = [2 * (ranks - 1) * t * OUTPUTS * 4 // ranks for t in tokens[1:]]
    vectors = [(ranks - 1) * (INPUTS // ranks) * 4] * len(schedule)
    for found in run_ranks(_traffic, ranks, "megatron"):
        for name in HOOKS:
            if name == "kv heads < ranks":
                continue
            moved = found[name]
            if name.startswith("iterative"):
                reduced = sorted(b for kind, b in moved if kind == "allreduce_")
                assert sum(reduced) == pytest.approx(sum(sums), rel=0.05), name
                assert [b for kind, b in moved if kind != "allreduce_"] == vectors, name
            else:
                assert moved == [], name
                entries = INPUTS // ranks
                last = {b for _, b in found[f"{name}, in the end"]}
                assert last == {(ranks - 1) * entries * 4}, name


def _norm_under_sequence_parallelism() -> tuple[Tensor, Tensor]:
    """Megatron's mark on a norm's weight tells that its tokens are cut over the ranks."""
    from frameworks.megatron_cpu import model_parallel

    x = torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(5))
    own = x.chunk(dist.get_world_size())[dist.get_rank()]
    norm = nn.LayerNorm(6)
    norm.weight.sequence_parallel = True  # type: ignore[attr-defined]
    with model_parallel(dist.get_world_size()):
        by_norm, by_size = LayerNormContributionHook(norm, {}), MegatronL2NormHook()
        by_size.watches = ("output",)  # type: ignore[misc]
        for hook in (by_norm, by_size):
            hook(norm, (own,), norm(own))
        return by_norm.accumulate().detach(), by_size.accumulate().detach()


@pytest.mark.parametrize("ranks", RANKS)
def test_tokens_cut_over_sequence_parallel_ranks(ranks: int) -> None:
    x = torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(5))
    normed = nn.LayerNorm(6)(x).detach()
    for by_norm, by_size in run_ranks(_norm_under_sequence_parallelism, ranks):
        torch.testing.assert_close(by_norm, normed.abs().mean((0, 1)))
        torch.testing.assert_close(by_size, normed.abs().mean(0).square().sum(0).sqrt())


def _resumed(state: dict[str, Any], name: str) -> dict[str, Tensor]:
    inputs = [own_channels(x) for x in values()[2]][CALLS // 2 + 1 :]
    with row_parallel("megatron") as layer:
        hook = HOOKS[name](layer)
        hook.load_state_dict(state)
        return run(hook, inputs, layer).result


@pytest.mark.parametrize("name", ["l2", "independent", "iterative", "kv heads", "heads"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_state_goes_on_at_another_size(name: str, ranks: int) -> None:
    """States of two ranks and of one are the same (above); here one goes on on others."""
    due = truth(name)
    for found in run_ranks(_resumed, ranks, due.state, name):
        _same(found, due.result, name)


# -- the reference's own cases -----------------------------------------------------------------


def _golden_l2(case: dict[str, Any]) -> Tensor:
    from frameworks.megatron_cpu import model_parallel

    given = load_file(GOLDEN / "tp2.safetensors")
    with model_parallel(2):
        hook = MegatronL2NormHook()
        for key in case[f"inputs_rank{dist.get_rank()}"]:
            hook(nn.Identity(), (given[key],), None)
        return hook.accumulate()


_TP2 = [c for c in cases("MegatronL2NormHook", "index_tp2.json") if "expected" in c]


@pytest.mark.parametrize("case", _TP2, ids=lambda case: case["case"])
def test_golden_at_two_ranks(case: dict[str, Any]) -> None:
    due = load_file(GOLDEN / "tp2.safetensors")[case["expected"]["accumulate_on_every_rank"]]
    first, second = run_ranks(_golden_l2, 2, case)
    torch.testing.assert_close(first, due, rtol=case["rtol"], atol=case["atol"])
    assert torch.equal(first, second)


def _replicated() -> tuple[int, Tensor]:
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from frameworks.megatron_cpu import model_parallel

    with model_parallel(2):
        config = TransformerConfig(
            num_layers=1, hidden_size=4, num_attention_heads=2, tensor_model_parallel_size=2,
            use_cpu_initialization=True,
        )  # fmt: skip
        layer = ColumnParallelLinear(4, 6, config=config, init_method=nn.init.ones_, bias=False)
        hook = MegatronL2NormHook()
        x = torch.arange(24.0).view(3, 2, 4)
        hook(layer, (x,), layer(x))
        return hook.accumulate().numel(), hook.accumulate()


def test_a_replicated_input_is_not_doubled() -> None:
    """The reference gives eight scores for these four channels."""
    x = torch.arange(24.0).view(3, 2, 4)
    for count, scores in run_ranks(_replicated, 2):
        assert count == 4
        torch.testing.assert_close(scores, x.abs().mean(0).square().sum(0).sqrt())


def test_l2_needs_no_framework() -> None:
    """Catches a hook that looks for groups where there are none."""
    hook = L2NormHook()
    hook(nn.Identity(), (torch.ones(2, 1, 3),), None)
    assert torch.equal(hook.accumulate(), torch.ones(3))
