"""Scores that the reference has no class for, against their formulas, token by token."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flex_model import FlexModel
from flex_model.errors import ImportanceError
from flex_model.importance import (
    AttentionHeadHook,
    ExpertHook,
    FusedExpertsHook,
    Heads,
    L2NormHook,
    LayerSimilarityHook,
    PaddingMask,
    layer_scores,
)
from flex_model.testing.ranks import RankFailure, run_ranks
from flex_model.testing.step import take_step
from frameworks.rows import row

EXPERTS, CHOSEN = 4, 2


def _batches(*shape: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def test_l2_per_token_does_not_depend_on_packing() -> None:
    """The same 64 tokens as one sample each, or as eight of eight."""
    (x,) = _batches(64, 5, count=1)
    found = []
    for shape in ((64, 1, 5), (8, 8, 5), (1, 64, 5), (64, 5)):
        hook = L2NormHook(per_token=True)
        hook(nn.Identity(), (x.view(shape),), None)
        found.append(hook.accumulate())
    for scores in found:
        torch.testing.assert_close(scores, x.square().sum(0).sqrt())


def test_hidden_size_is_scored_on_outputs() -> None:
    norm, batches = nn.LayerNorm(5), _batches(4, 2, 5)
    hook = L2NormHook(side="output")
    handle = norm.register_forward_hook(hook)
    for x in batches:
        norm(x)
    handle.remove()
    due = sum(norm(x).abs().mean(0).square().sum(0) for x in batches).sqrt()
    torch.testing.assert_close(hook.accumulate(), due.detach())


def test_layers_by_how_little_they_change() -> None:
    """``sum over calls of (1 - mean cosine)``; padding is left out of the mean."""
    layers = {"a": nn.Linear(5, 5), "b": nn.Linear(5, 5)}
    hooks = {name: LayerSimilarityHook() for name in layers}
    keep = torch.tensor([[True, True, False], [True, False, False]])
    due = dict.fromkeys(layers, 0.0)
    for x in _batches(2, 3, 5):
        for name, layer in layers.items():
            hooks[name].mask = PaddingMask(keep, 3)
            hooks[name](layer, (x,), layer(x))
            cosines = [
                F.cosine_similarity(x[b, t], layer(x)[b, t], dim=0).item()
                for b, t in ((0, 0), (0, 1), (1, 0))
            ]
            due[name] += 1 - sum(cosines) / 3
    torch.testing.assert_close(layer_scores(hooks), torch.tensor([*due.values()]))


def test_heads_are_ranked_within_their_groups() -> None:
    layer, heads = nn.Linear(12, 5), Heads(query=4, key_value=2, width=3)
    hook, batches = AttentionHeadHook(layer, heads), _batches(6, 2, 12)
    for x in batches:
        hook(layer, (x,), None)
    squares = sum(x.abs().mean(0).square().sum(0) for x in batches)
    due = torch.stack([squares[h * 3 : h * 3 + 3].sum().sqrt() for h in range(4)])
    found = hook.to_dict()
    torch.testing.assert_close(found["score"], due)
    for group, ascending in enumerate(found["heads_importance_ascending"].tolist()):
        assert sorted(ascending) == [2 * group, 2 * group + 1]
        assert due[ascending[0]] <= due[ascending[1]]


# -- experts -----------------------------------------------------------------------------------


class Experts(nn.Module):
    """Fused as transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * 7, 5, generator=generator))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, 5, 7, generator=generator))
        self.act_fn = nn.SiLU()


def test_fused_experts_token_by_token() -> None:
    """The last expert is chosen by nobody: zero, not NaN."""
    experts, (x,) = Experts(), _batches(9, 5, count=1)
    generator = torch.Generator().manual_seed(4)
    chosen = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:CHOSEN]
                          for _ in range(9)])  # fmt: skip
    weights = torch.rand(9, CHOSEN, generator=generator)
    hook = FusedExpertsHook(experts)
    hook(experts, (x, chosen, weights), None)
    due = torch.zeros(EXPERTS)
    for token in range(9):
        for place in range(CHOSEN):
            expert = int(chosen[token, place])
            gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
            output = experts.down_proj[expert] @ (F.silu(gate) * up)
            due[expert] += (weights[token, place] * output).norm().item()
    assert due[-1] == 0
    torch.testing.assert_close(hook.accumulate(), due)


def _transformers(name: str, sharded: bool) -> Tensor:
    case = row(name)
    with (case.sharded if sharded else case.whole)() as model:
        experts = model.module.get_submodule("model.layers.1.mlp.experts")
        hook = FusedExpertsHook(experts)
        dp = case.dp if sharded else 1
        tp = dist.get_world_size() // dp
        sizes = {"tensor_parallel_size": tp, "data_parallel_size": dp}
        with FlexModel(model.module, {}, **sizes) as hooked:
            hooked.register_importance_hook("model.layers.1.mlp.experts", hook)
            take_step(case, model, hooked, dp)
        return hook.accumulate()


def test_fused_experts_shared_out_over_ranks_are_refused() -> None:
    """Each rank would score the experts that it has for its own tokens alone."""
    with pytest.raises(RankFailure, match=r"experts are\s+shared out"):
        run_ranks(_transformers, 2, "transformers moe", True)


def _mixtral_over_tp(ranks: int) -> Tensor:
    """A Mixtral whose experts' inner channels are cut by its tp_plan."""
    from transformers import MixtralForCausalLM
    from transformers.distributed import DistributedConfig

    from frameworks import transformers_moe

    with transformers_moe._saved(False) as folder:
        options = {"distributed_config": DistributedConfig(tp_size=ranks)} if ranks > 1 else {}
        module = MixtralForCausalLM.from_pretrained(
            folder, attn_implementation="eager", experts_implementation="eager", **options
        )
    hook = FusedExpertsHook(module.get_submodule("model.layers.1.mlp.experts"))
    ids = torch.randint(34, (2, 6), generator=torch.Generator().manual_seed(1))
    with FlexModel(module, {}, tensor_parallel_size=ranks) as hooked, torch.no_grad():
        hooked.register_importance_hook("model.layers.1.mlp.experts", hook)
        hooked(input_ids=ids)
    return hook.accumulate()


def test_fused_experts_cut_over_tensor_parallel_ranks() -> None:
    (due,) = run_ranks(_mixtral_over_tp, 1, 1)
    for found in run_ranks(_mixtral_over_tp, 2, 2):
        torch.testing.assert_close(found, due, rtol=1e-5, atol=1e-6)


def _megatron(name: str, sharded: bool) -> dict[int, Tensor]:
    """By the expert's number in all: a rank counts its own from zero."""
    case = row(name)
    with (case.sharded if sharded else case.whole)() as model:
        experts = model.module.get_submodule("decoder.layers.1.mlp.experts.local_experts")
        first = dist.get_rank() % 2 * len(experts) if sharded else 0
        hooks = {first + number: ExpertHook() for number in range(len(experts))}
        for hook, expert in zip(hooks.values(), experts, strict=True):
            expert.register_forward_hook(hook)
        take_step(case, model, model.module, case.dp if sharded else 1)
        return {number: hook.accumulate() for number, hook in hooks.items()}


@pytest.mark.parametrize("name", ["megatron moe", "megatron moe idle"])
def test_experts_as_modules_at_their_ranks(name: str) -> None:
    """All tokens of an expert come to its rank; one that nobody chose scores zero."""
    (due,) = run_ranks(_megatron, 1, name, False)
    found = {n: s for scores in run_ranks(_megatron, 2, name, True) for n, s in scores.items()}
    assert sorted(found) == sorted(due)
    for number, score in due.items():
        torch.testing.assert_close(found[number], score, rtol=1e-5, atol=1e-6)


def test_no_fused_experts() -> None:
    with pytest.raises(ImportanceError, match="ExpertHook"):
        FusedExpertsHook(nn.Linear(3, 3))
