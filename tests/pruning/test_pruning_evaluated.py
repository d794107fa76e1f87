"""Perplexity: the number, and the comparison that leaves the model as it was."""

import math
from typing import Any

import pytest
import torch
from pruned_models import HIDDEN, build, ids, logits, snapshot, targets
from rich.console import Console

from flex_model.errors import PruningError
from flex_model.pruning import Target, compare, comparison_table, perplexity, prune, random_scores


def test_perplexity_is_of_the_mean_over_tokens() -> None:
    """Catches a mean of batches' means, and a token compared with itself."""
    model = build("llama").train()
    batches = [ids(), ids()[:1, :3] + 1]
    total = sum(model(input_ids=b, labels=b).loss.item() * b[:, 1:].numel() for b in batches)
    count = sum(b[:, 1:].numel() for b in batches)
    assert perplexity(model, iter(batches)) == pytest.approx(math.exp(total / count), rel=1e-5)
    assert model.training


def test_a_model_that_knows_nothing_is_as_perplexed_as_there_are_tokens() -> None:
    """Catches a logarithm to another base."""
    model = build("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, [ids()]) == pytest.approx(34, rel=1e-5)


@pytest.mark.parametrize(
    "batches", [[], [torch.ones(2, 1).long()], [torch.ones(7).long()], [torch.ones(2, 7)], [[1, 2]]]
)
def test_nothing_to_predict_is_named(batches: Any) -> None:
    """Catches a perplexity of no token at all."""
    with pytest.raises(PruningError):
        perplexity(build("llama"), batches)


@pytest.mark.parametrize("kind", ["gemma2", "qwen2_moe"])
def test_a_comparison_is_of_the_three_models_and_leaves_the_first(kind: str) -> None:
    """Catches numbers of another model, and a model that does not come back."""
    model = build(kind)
    before, due_logits = snapshot(model), logits(model)
    found = compare(model, random_scores(model, 5), [ids()], seed=6, **targets(kind))
    assert snapshot(model) == before
    assert torch.equal(logits(model), due_logits)
    assert found.before.perplexity == perplexity(model, [ids()])
    for seed, row in ((5, found.after), (6, found.random)):
        other = build(kind)
        plan = prune(other, random_scores(other, seed), **targets(kind))
        assert row.parameters == plan.parameters_after
        assert row.perplexity == perplexity(other, [ids()])
    console = Console(width=100)
    with console.capture() as captured:
        console.print(comparison_table(found))
    for name in ("before", "after", "random"):
        assert name in captured.get()


def test_what_matters_is_kept() -> None:
    """Catches scores that are turned round on the way: channels that do nothing cost nothing."""
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] = 0
    scores = {
        f"model.layers.{number}.mlp.down_proj": layer.mlp.down_proj.weight.norm(dim=0)
        for number, layer in enumerate(model.model.layers)
    }
    found = compare(model, scores, [ids()], ffn=Target(ratio=0.5))
    assert found.after.perplexity == pytest.approx(found.before.perplexity, rel=1e-5)
    assert abs(found.random.perplexity / found.before.perplexity - 1) > 0.01
    assert model.config.hidden_size == HIDDEN
