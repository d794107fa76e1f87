"""Tensor parallelism: pruned in place, a model is the one that one process prunes and shards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pruned_models import build, ids, logits, snapshot, targets
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from flex_model.errors import FlexModelError
from flex_model.pruning import Target, compare, prune, random_scores, save
from flex_model.testing.compare import relative_error
from flex_model.testing.ranks import run_ranks
from traffic import Counting

EXACT = 1e-5
SEED = 8
# Separate and fused projections, with biases; tied embeddings; experts, a shared and a dense one.
SPREAD = ["llama", "phi3", "gemma2", "mixtral", "qwen2_moe"]


def _sharded(folder: Path) -> Any:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        folder,
        distributed_config=DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size()),
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _gradients(model: Any) -> dict[str, Tensor]:
    model(input_ids=ids()).logits.square().mean().backward()
    return {name: _whole(p.grad) for name, p in model.named_parameters()}


def _pruned_in_place(folder: Path, kind: str) -> dict[str, Any]:
    model = _sharded(folder)
    plan = prune(model, random_scores(model, SEED), **targets(kind))
    save(model, folder.parent / "pruned")
    return {
        "logits": logits(model),
        "weights": {name: _whole(tensor) for name, tensor in model.state_dict().items()},
        "local": {
            name: tuple(p.to_local().shape)
            for name, p in model.named_parameters()
            if isinstance(p, DTensor)
        },
        "gradients": _gradients(model),
        "parameters": plan.parameters_after,
    }


@pytest.mark.parametrize("kind", SPREAD)
def test_in_place_is_as_on_one_process(kind: str, tmp_path: Path) -> None:
    """Catches shards that keep their own best, entries that come in another order, uneven ranks,
    and a checkpoint that is another one's.
    """
    model = build(kind)
    model.save_pretrained(tmp_path / "model")
    plan = prune(model, random_scores(model, SEED), **targets(kind))
    due, gradients = logits(model), _gradients(model)
    ranks = run_ranks(_pruned_in_place, 2, tmp_path / "model", kind)
    for rank in ranks:
        assert relative_error(rank["logits"], due) <= EXACT
        for name, value in model.state_dict().items():
            assert torch.equal(rank["weights"][name], value), name
        for name, value in gradients.items():
            assert relative_error(rank["gradients"][name], value) <= EXACT, name
        assert rank["parameters"] == plan.parameters_after
    assert ranks[0]["local"] == ranks[1]["local"], "the ranks hold unequal shares"
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "pruned", attn_implementation="eager", experts_implementation="eager"
    )
    assert torch.equal(logits(loaded.eval()), due)


def _moved_in_place(folder: Path) -> list[int]:
    model = _sharded(folder)
    scores = random_scores(model, SEED)
    found = []
    for left in ({"hidden": Target(size=16)}, {"layers": Target(size=2)}, {"ffn": Target(size=30)}):
        with Counting() as traffic:
            prune(model, scores, **left)
        found.append(sum(n for (name, _), n in traffic.seen.items() if "alltoall" in name))
        scores = random_scores(model, SEED)
    return found


def test_what_no_rank_lacks_is_not_moved(tmp_path: Path) -> None:
    """Catches an exchange of weights whose pruned dim every rank holds."""
    build("llama").save_pretrained(tmp_path / "model")
    # Of two layers gate and up, each with a bias, and down.
    assert run_ranks(_moved_in_place, 2, tmp_path / "model") == [[0, 0, 2 * 5]] * 2


def _refused(folder: Path) -> list[tuple[str, str, bool]]:
    model = _sharded(folder)
    before, rank = snapshot(model), dist.get_rank()
    scores = random_scores(model, SEED)
    name = "model.layers.1.mlp.down_proj"
    holes = {**scores, name: torch.full_like(scores[name], torch.nan)}
    taken = folder.parent / "taken"
    cases: tuple[Callable[[], Any], ...] = (
        lambda: prune(model, scores, ffn=Target(size=31)),
        lambda: prune(model, scores, kv_heads=Target(size=1)),
        lambda: prune(model, holes, ffn=Target(ratio=0.5)),
        lambda: prune(model, holes if rank == 1 else scores, ffn=Target(ratio=0.5)),
        lambda: prune(model, random_scores(model, rank), ffn=Target(ratio=0.5)),
        lambda: prune(model, scores, ffn=Target(size=30 if rank else 20)),
        lambda: save(model, taken),
    )
    return [(*_error_of(case), snapshot(model) == before) for case in cases]


def _error_of(case: Callable[[], Any]) -> tuple[str, str]:
    try:
        case()
    except FlexModelError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def test_all_ranks_refuse_alike_and_change_nothing(tmp_path: Path) -> None:
    """Catches a rank that waits for one that has raised, and a model that is cut on some ranks."""
    build("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "taken").mkdir()
    first, second = run_ranks(_refused, 2, tmp_path / "model")
    due = (
        ("PruningError", "intermediate_size=31 does not divide over 2 tensor-parallel ranks"),
        ("PruningError", "num_key_value_heads=1 does not divide over 2 tensor-parallel ranks"),
        ("PruningError", "44 scores of model.layers.1.mlp.down_proj are NaN"),
        ("PruningError", "44 scores of model.layers.1.mlp.down_proj are NaN"),
        ("RankDisagreementError", "Ranks disagree on what is left"),
        ("RankDisagreementError", "Ranks disagree on what is left"),
        ("PruningError", "exists already"),
    )
    for told in (first, second):
        assert len(told) == len(due)
        for (kind, message, unchanged), (expected, text) in zip(told, due, strict=True):
            assert kind == expected
            assert text in message
            assert unchanged, message
    assert first[3][1] == f"Rank 1 refused, so all ranks do: {second[3][1]}"


def _compared(folder: Path) -> tuple[Any, bool]:
    model = _sharded(folder)
    before = snapshot(model)
    found = compare(model, random_scores(model, SEED), [ids()], **targets("llama"))
    return found, snapshot(model) == before


def test_perplexities_are_those_of_one_process(tmp_path: Path) -> None:
    """Catches a comparison that leaves a sharded model pruned, or measures another one."""
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    due = compare(model, random_scores(model, SEED), [ids()], **targets("llama"))
    for found, unchanged in run_ranks(_compared, 2, tmp_path / "model"):
        assert unchanged
        for name in ("before", "after", "random"):
            one, many = getattr(due, name), getattr(found, name)
            assert many.parameters == one.parameters
            assert many.perplexity == pytest.approx(one.perplexity, rel=EXACT)


def _refused_otherwise_spread(folder: Path, kind: str, **sizes: int) -> tuple[str, str]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**sizes), experts_implementation="eager"
    )
    return _error_of(lambda: prune(model, random_scores(model), **targets(kind)))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("llama", {"fsdp_size": 2}), ("mixtral", {"fsdp_size": 2, "ep_size": 2})],
    ids=["fsdp", "experts"],
)
def test_other_ways_to_spread_a_model_are_refused(
    kind: str, sizes: dict[str, int], tmp_path: Path
) -> None:
    """Catches shards that are cut as if they were tensor-parallel ones."""
    build(kind).save_pretrained(tmp_path / "model")
    for error, message in run_ranks(
        _refused_otherwise_spread, 2, tmp_path / "model", kind, **sizes
    ):
        assert error == "PruningError"
        assert "spread over ranks along dp" in message
