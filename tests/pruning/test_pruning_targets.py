"""How much is cut: by ratio, by size, within a budget; and what a plan tells of it."""

import math

import pytest
import torch
from pruned_models import INNER, build, highest, snapshot, targets
from rich.console import Console

from flex_model.pruning import Target, plan_table, prune, random_scores


@pytest.mark.parametrize(
    ("target", "size", "left"),
    [
        (Target(ratio=0.0), 40, 40),
        (Target(ratio=0.25), 40, 30),
        (Target(ratio=0.29), 100, 71),  # 100 * 0.29 is a little less than 29
        (Target(ratio=0.3), 7, 5),
        (Target(ratio=0.3, multiple_of=4), 44, 32),
        (Target(ratio=0.0, multiple_of=32), 44, 44),
        (Target(size=3), 40, 3),
    ],
)
def test_what_is_left(target: Target, size: int, left: int) -> None:
    """Catches an index too few or too many."""
    assert target.left(size) == left


def test_the_highest_scores_are_kept_in_order() -> None:
    """Catches scores read upside down, and equal ones decided by chance."""
    model = build("llama")
    scores = random_scores(model)
    name = "model.layers.0.mlp.down_proj"
    scores[name] = torch.tensor([1, 3, 3, 2] * 11)  # whole numbers, many of them equal
    plan = prune(model, scores, ffn=Target(size=30), dry_run=True)
    kept = plan.kept[name].tolist()
    assert kept == highest(scores[name], 30)
    cut = next(cut for cut in plan.cuts if cut.space.name == name)
    assert sorted(kept + cut.dropped.tolist()) == list(range(INNER))


@pytest.mark.parametrize("dimension", ["ffn", "hidden", "layers", "kv_heads"])
def test_a_budget_is_met_and_not_by_far(dimension: str) -> None:
    """Catches a budget that is missed, or met by cutting more than it takes."""
    model = build("mistral")
    scores = random_scores(model, 3)
    whole = prune(model, scores, ffn=Target(ratio=0), dry_run=True).parameters_before
    budget = math.floor(whole * 0.8)
    plan = prune(model, scores, **{dimension: Target(parameters=budget)}, dry_run=True)
    assert plan.parameters_after <= budget
    one_more = Target(size=plan.cuts[0].left + 1)
    assert prune(model, scores, **{dimension: one_more}, dry_run=True).parameters_after > budget


def test_dimensions_share_a_budget() -> None:
    """Catches a budget that one dimension pays alone, or that counts others' cuts twice."""
    model = build("qwen2_moe")
    scores = random_scores(model)
    budget = Target(parameters=15_000, multiple_of=2)
    plan = prune(model, scores, ffn=budget, hidden=budget, layers=Target(size=2))
    assert sum(p.numel() for p in model.parameters()) == plan.parameters_after <= 15_000
    shares = [cut.left / cut.space.size for cut in plan.cuts if cut.space.name != "layers"]
    assert max(shares) - min(shares) < 0.1


def test_a_budget_that_is_met_already_cuts_nothing() -> None:
    """Catches a model that is cut for the sake of cutting."""
    model = build("llama")
    before = snapshot(model)
    plan = prune(model, random_scores(model), ffn=Target(parameters=10**9))
    assert (plan.cuts, dict(plan.fields)) == ((), {})
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", ["llama", "qwen2_moe"])
def test_a_dry_run_tells_all_and_changes_nothing(kind: str) -> None:
    """Catches a dry run that cuts, or promises other numbers than come of it."""
    model = build(kind)
    before, scores = snapshot(model), random_scores(model)
    plan = prune(model, scores, **targets(kind), dry_run=True)
    assert snapshot(model) == before
    console = Console(width=200)
    with console.capture() as captured:
        console.print(plan_table(plan))
    for text in (f"{plan.parameters_after:,} are left", "config: hidden_size = 20", "kv_heads"):
        assert text in captured.get()
    assert sum(p.numel() for p in model.parameters()) == plan.parameters_before
    prune(model, scores, **targets(kind))
    assert sum(p.numel() for p in model.parameters()) == plan.parameters_after


def test_random_scores_are_the_seed_s() -> None:
    """Catches a baseline that is another one each time, or draws from the caller's stream."""
    model = build("mixtral")
    state = torch.get_rng_state()
    one, same, other = (random_scores(model, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert one.keys() == same.keys()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
