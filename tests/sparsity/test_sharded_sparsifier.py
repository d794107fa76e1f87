"""Masks and sparse outputs of sharded models: those of one process given the ranks' batches."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from sparse_models import (
    Job,
    Mlp,
    add,
    add_whole,
    batches,
    graded,
    half,
    itself,
    largest,
    mean,
    mean_declared,
    mean_per_token,
    mean_whole,
    peak,
)
from torch import Tensor

from flex_model.errors import SparsityError
from flex_model.sparsity import ActivationSparsifier
from flex_model.testing.compare import relative_error
from flex_model.testing.ranks import RankFailure, run_ranks
from traffic import Counting

JOBS = [Job(1, 2), Job(2, 1), Job(1, 4), Job(2, 2)]
WAYS: dict[str, dict[str, Any]] = {
    "on shards": {"aggregate_fn": add, "reduce_fn": mean, "mask_fn": graded},
    "per token": {"aggregate_fn": add, "reduce_fn": mean_per_token, "mask_fn": graded},
    "every entry": {"aggregate_fn": add, "reduce_fn": itself, "mask_fn": graded},
    "on whole tensors": {"aggregate_fn": add_whole, "reduce_fn": mean_whole, "mask_fn": half},
    "reduced whole": {"aggregate_fn": add, "reduce_fn": mean_whole, "mask_fn": graded},
    "masked whole": {"aggregate_fn": add, "reduce_fn": mean, "mask_fn": half},
    "a statistic": {"aggregate_fn": add, "reduce_fn": mean_declared, "mask_fn": graded},
    "combined": {
        "aggregate_fn": largest, "reduce_fn": peak, "mask_fn": graded, "combine_fn": largest,
    },
    "features": {
        "aggregate_fn": add, "reduce_fn": mean_per_token, "mask_fn": graded,
        "features": [6, 1], "feature_dim": -1,
    },
    "features of tokens": {
        "aggregate_fn": add, "reduce_fn": mean_per_token, "mask_fn": graded,
        "features": [0, 3], "feature_dim": 1,
    },
}  # fmt: skip
LAYERS = ("up", "down")
STEPS = (4, 4, 4)
Told = dict[str, Any]


def _arguments(way: str, layer: str) -> dict[str, Any]:
    found = dict(WAYS[way])
    if layer == "up" and way == "features":
        found["features"] = [5, 1]
    return found


def _sparse(sparsifier: ActivationSparsifier, model: Any, given: list[Tensor], x: Tensor) -> Told:
    for one in given:
        model(one)
    sparsifier.step()
    masks = {name: sparsifier.get_mask(name) for name in LAYERS}
    sparsifier.squash_mask()
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    return {**masks, "out": out.detach(), "grad": x.grad}


def _truth(way: str, dp: int, sizes: tuple[int, ...]) -> Told:
    model = Mlp()
    sparsifier = ActivationSparsifier(model)
    for name in LAYERS:
        sparsifier.register_layer(name, **_arguments(way, name))
    *given, x = batches(*sizes, 4)
    # What a mask of single samples multiplies is one replica's batch.
    told = _sparse(sparsifier, model, [part for one in given for part in one.chunk(dp)],
                   x.chunk(dp)[0])  # fmt: skip
    parts = [torch.zeros(0)] * dp
    grads = [torch.zeros(0)] * dp
    for number, part in enumerate(x.chunk(dp)):
        leaf = part.clone().requires_grad_()
        out = model(leaf)
        out.square().sum().backward()
        parts[number], grads[number] = out.detach(), leaf.grad  # type: ignore[call-overload]
    return {**told, "out": torch.cat(parts), "grad": torch.cat(grads)}


def _sharded(job: Job, ways: list[str], sizes: tuple[int, ...]) -> dict[str, Told]:
    found = {}
    for way in ways:
        with job.model() as flex:
            sparsifier = ActivationSparsifier(flex)
            for name in LAYERS:
                sparsifier.register_layer(name, **_arguments(way, name))
            given = [job.part(x) for x in batches(*sizes, 4)]
            found[way] = _sparse(sparsifier, flex, given[:-1], given[-1])
    return found


def _same(found: Told, due: Told, place: int, dp: int, where: str) -> None:
    for key, value in due.items():
        here = value.chunk(dp)[place] if key in ("out", "grad") else value
        pairs = (
            zip(found[key], here, strict=True) if isinstance(here, list) else [(found[key], here)]
        )
        for one, other in pairs:
            assert one.shape == other.shape, f"{where} {key}"
            assert one.dtype == other.dtype, f"{where} {key}"
            assert relative_error(one.double(), other.double()) <= 1e-5, f"{where} {key}"


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_masks_and_outputs_equal_one_process(job: Job) -> None:
    """Every mix of functions that may and that may not work on shards; row-parallel sums: 1e-5."""
    due = {way: _truth(way, job.dp, STEPS) for way in WAYS}
    found = run_ranks(_sharded, job.ranks, job, list(WAYS), STEPS)
    for rank, told in enumerate(found):
        for way in WAYS:
            _same(told[way], due[way], rank // job.tp, job.dp, f"{way} on rank {rank}")
            for name in LAYERS:
                first, here = found[0][way][name], told[way][name]
                same = first if isinstance(first, list) else [first]
                own = here if isinstance(here, list) else [here]
                assert all(torch.equal(a, b) for a, b in zip(same, own, strict=True)), way


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_a_ragged_batch(job: Job) -> None:
    """A last batch of 2 after batches of 4, where means of added batches are added means."""
    ways = ["on shards", "on whole tensors", "masked whole", "combined"]
    due = {way: _truth(way, job.dp, (4, 2, 4)) for way in ways}
    for rank, told in enumerate(run_ranks(_sharded, job.ranks, job, ways, (4, 2, 4))):
        for way in ways:
            _same(told[way], due[way], rank // job.tp, job.dp, f"{way} on rank {rank}")


def _uneven(way: str, size: int) -> tuple[Tensor, Tensor]:
    """Replicas whose batches differ: 3 samples here, 1 there."""
    with Job(2, 1).model() as flex:
        sparsifier = ActivationSparsifier(flex, **WAYS[way])
        sparsifier.register_layer("down")
        rank = dist.get_rank()
        for x in batches(4, 4):
            flex(x.split([size, 4 - size])[rank])
        before = sparsifier.data_groups["down"]["data"].clone()
        if way == "every entry":
            with pytest.raises(SparsityError, match="different shapes"):
                sparsifier.step()
            assert torch.equal(sparsifier.data_groups["down"]["data"], before)
            return before, torch.tensor(-1.0)
        sparsifier.step()
        return before, sparsifier.get_mask("down")  # type: ignore[return-value]


@pytest.mark.parametrize("way", ["on shards", "combined"])
def test_replicas_whose_batches_differ(way: str) -> None:
    model = Mlp()
    sparsifier = ActivationSparsifier(model, **WAYS[way])
    sparsifier.register_layer("down")
    first, second = batches(4, 4)
    masks = [mask for _, mask in run_ranks(_uneven, 2, way, 3)]
    totals = []
    for part in (0, 1):
        sparsifier.register_layer("down")
        for x in (first, second):
            model(x.split([3, 1])[part])
        data = sparsifier.data_groups["down"]["data"]
        totals.append(WAYS[way]["reduce_fn"](data))
    due = graded(largest(*totals) if way == "combined" else add(*totals))
    for mask in masks:
        torch.testing.assert_close(mask, due)


def test_replicas_whose_batches_differ_without_a_reduction() -> None:
    """Named on every rank, and what was aggregated is still there."""
    for _, mask in run_ranks(_uneven, 2, "every entry", 3):
        assert mask == -1.0


def _traffic(job: Job, way: str) -> list[Any]:
    with job.model() as flex, torch.no_grad():
        sparsifier = ActivationSparsifier(flex, **WAYS[way])
        sparsifier.register_layer("down")
        x = job.part(batches(4)[0])
        flex(x)  # the first forward finds the layout

        def moved() -> Any:
            with Counting() as counting:
                flex(x)
            return counting.seen

        aggregating = moved()
        sparsifier.step()
        sparsifier.squash_mask()
        moved()
        sparsifying = moved()
        sparsifier.unregister_layer("down")
        bare = moved()
        return [*(aggregating - bare).elements()], [*(sparsifying - bare).elements()]  # type: ignore[return-value]


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_nothing_is_moved_where_shards_suffice(job: Job) -> None:
    """Neither aggregating nor sparsifying: only a vector, when a mask is made."""
    for aggregating, sparsifying in run_ranks(_traffic, job.ranks, job, "on shards"):
        assert aggregating == []
        assert sparsifying == []


def _context(order: Any) -> dict[str, Any]:
    from flex_model import FlexModel

    rank, found = dist.get_rank(), {}
    given = []
    for x in batches(4, 4):
        whole = torch.cat([x, x.flip(1)[:, :3]], 1)  # 8 tokens
        chunks = whole.chunk(4, 1)
        pair = (rank, 3 - rank) if order == "zigzag" else (2 * rank, 2 * rank + 1)
        given.append(torch.cat([chunks[at] for at in pair], 1))
    for way in ("per token", "on whole tensors", "on shards", "a statistic"):
        with FlexModel(Mlp(), {}, context_parallel_size=2, context_order=order) as flex:
            sparsifier = ActivationSparsifier(flex, **WAYS[way])
            sparsifier.register_layer("down")
            flex(given[0])
            sparsifier.step()
            sparsifier.squash_mask()
            found[way] = (sparsifier.get_mask("down"), flex(given[1]).detach())
    return found


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_sequences_cut_over_context_parallel_ranks(order: Any) -> None:
    """Masks of whole sequences in the order of positions, applied to each rank's own."""
    first, second = (torch.cat([x, x.flip(1)[:, :3]], 1) for x in batches(4, 4))
    told = run_ranks(_context, 2, order)
    for way in told[0]:
        model = Mlp()
        sparsifier = ActivationSparsifier(model, **WAYS[way])
        sparsifier.register_layer("down")
        model(first)
        sparsifier.step()
        sparsifier.squash_mask()
        chunks = model(second).detach().chunk(4, 1)
        for rank, found in enumerate(told):
            mask, out = found[way]
            torch.testing.assert_close(mask, sparsifier.get_mask("down"))
            pair = (rank, 3 - rank) if order == "zigzag" else (2 * rank, 2 * rank + 1)
            torch.testing.assert_close(out, torch.cat([chunks[at] for at in pair], 1))


def _pipeline() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    from flex_model import FlexModel

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    with FlexModel(Mlp(), {}, mesh=mesh) as flex:
        ActivationSparsifier(flex)


def test_a_pipeline_is_refused() -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(_pipeline, 2)
    assert {failure.kind for failure in caught.value.failures.values()} == {"SparsityError"}
