"""Rotated on the shards that ranks hold: outputs stay, weights are those of one process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from spin_models import HEAD_DIM, SUBSETS, build, ids, logits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from flex_model.compress.spinquant import infer, random_orthogonal_matrix, rotate
from flex_model.compress.spinquant.orthogonal import Dense, Hadamard
from flex_model.compress.spinquant.sharded import Cut, Split, turn
from flex_model.distributed.communicator import Communicator
from flex_model.errors import FlexModelError
from flex_model.testing.compare import relative_error
from flex_model.testing.ranks import run_ranks
from traffic import Counting

EXACT = 1e-5
WEIGHTS = 2e-6


def _sharded(folder: Path, **spread: Any) -> Any:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    spread = spread or {"tp_plan": "auto", "tp_size": dist.get_world_size()}
    return AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**spread), attn_implementation="sdpa"
    ).eval()


def _whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in model.named_parameters()
    }


def _turned(model: Any, run: Callable[[Any], Tensor], how: dict[str, Any]) -> dict[str, Any]:
    """Rotate and undo: outputs and weights by then, and collectives by name."""
    mapping, norms = infer(model)
    if not hasattr(model, "config"):  # a hand-written model
        mapping = replace(mapping, attn_head_dim=HEAD_DIM)
    before = run(model)
    with Counting() as writing:
        rotated = rotate(model, mapping, norms, **how)
    with Counting() as running:
        after = run(model)
    found = {
        "moved": relative_error(after, before),
        "weights": _whole(model),
        "writing": _by_name(writing),
        "running": _by_name(running),
    }
    rotated.undo()
    return {**found, "undone": relative_error(run(model), before)}


def _by_name(counting: Counting) -> dict[str, int]:
    """Without the few integers by which ranks agree, 3 of each."""
    few = 3 * 8 * (dist.get_world_size() - 1)
    return {name: n for (name, size), n in counting.seen.items() if size != few}


def _transformers(folder: Path, spread: Any, each: Sequence[dict[str, Any]]) -> Any:
    model = _sharded(folder, **spread)
    return [_turned(model, logits, how) for how in each]


def _check(ranks: Sequence[Any], kind: Any, each: Sequence[dict[str, Any]]) -> None:
    """Against the whole model, rotated likewise."""
    for at, how in enumerate(each):
        due = build(**kind)
        rotate(due, **how)
        for rank in ranks:
            assert rank[at]["moved"] <= EXACT, how
            assert rank[at]["undone"] <= EXACT, how
            for name, value in due.state_dict().items():
                assert torch.allclose(rank[at]["weights"][name], value, rtol=0, atol=WEIGHTS), name


@pytest.mark.parametrize(
    ("size", "subsets"), [(2, SUBSETS), (4, [("R1", "R2", "R3"), ("R4",), SUBSETS[-1]])]
)
def test_every_subset_under_tensor_parallelism(
    size: int, subsets: Sequence[Any], tmp_path: Path
) -> None:
    """Catches shards that are rotated as if whole, gathers, and exchanges with the wrong rank."""
    kind = {"num_key_value_heads": size}
    build(**kind).save_pretrained(tmp_path)
    each = [{"rotations": subset} for subset in subsets]
    ranks = run_ranks(_transformers, size, tmp_path, {}, each)
    _check(ranks, kind, each)
    exchanges = {2: 1, 4: 2}[size]
    for rank in ranks:
        for how, found in zip(each, rank, strict=True):
            online = "R4" in how["rotations"]
            due = {"send": 2 * exchanges, "recv_": 2 * exchanges} if online else {}
            assert found["writing"] == due, how  # one weight and one activation in each of 2 layers
            assert {n: found["running"].get(n) for n in due} == due
            assert found["running"].get("all_gather_into_tensor", 0) == 1  # the head's own


@pytest.mark.parametrize(
    "how",
    [
        {"rotations": ("R4",), "block_size": 16},
        {"rotations": SUBSETS[-1], "block_size": 8, "transform_type": "random-matrix"},
        {"rotations": ("R4",), "transform_type": "random-matrix"},
        {"rotations": SUBSETS[-1], "transform_type": "random-hadamard", "randomize": True},
    ],
    ids=["blocks", "dense blocks", "dense", "signs"],
)
def test_other_matrices(how: dict[str, Any], tmp_path: Path) -> None:
    """Catches blocks that move though no rank shares them, dense ones that do not, and matrices
    that differ from rank to rank.
    """
    build().save_pretrained(tmp_path)
    ranks = run_ranks(_transformers, 2, tmp_path, {}, [how])
    _check(ranks, {}, [how])
    for (found,) in ranks:
        if "block_size" in how:
            assert not found["writing"]
        elif how["rotations"] == ("R4",):
            assert found["writing"] == {"_allgather_base_": 2}  # each layer's weight, once


@pytest.mark.parametrize("kind", ["qwen3", "gemma"])
def test_tied_embeddings(kind: str, tmp_path: Path) -> None:
    """Catches a head that stays tied to an embedding that is cut, or is untied to a whole one."""
    build(kind).save_pretrained(tmp_path)
    each = [{"rotations": SUBSETS[-1]}]
    _check(run_ranks(_transformers, 2, tmp_path, {}, each), {"kind": kind}, each)


def _refused(folder: Path) -> Any:
    model, rank = _sharded(folder), dist.get_rank()
    down = model.model.layers[1].mlp.down_proj.weight
    matrix = random_orthogonal_matrix(64, torch.Generator().manual_seed(rank))
    before = _whole(model)
    found = []
    for how in (
        {"seed": rank, "transform_type": "random-hadamard"},
        {"matrices": {"R4": matrix}},
        {"block_size": 24 if rank else None},
        {},
    ):
        down.requires_grad_(bool(how) or rank == 0)  # at last one rank's alone is frozen
        with pytest.raises(FlexModelError) as raised:
            rotate(model, rotations=("R1", "R4"), **how)
        found.append((type(raised.value).__name__, str(raised.value)))
    assert all(torch.equal(value, before[name]) for name, value in _whole(model).items())
    return found


def test_all_ranks_refuse_alike(tmp_path: Path) -> None:
    """Catches a rank that waits for one that has raised, and ranks with matrices of their own."""
    build().save_pretrained(tmp_path)
    first, second = run_ranks(_refused, 2, tmp_path)
    for told in (first, second):
        assert [kind for kind, _ in told] == ["RankDisagreementError"] * 2 + [
            "CompressionError"
        ] * 2
    assert "Another rank refused" in first[2][1]
    assert "does not divide" in second[2][1]
    assert "Another rank refused" in first[3][1]
    assert "is frozen" in second[3][1]


def test_fully_sharded(tmp_path: Path) -> None:
    """Catches weights that are written while FSDP2 holds others, and rows taken for features."""
    build().save_pretrained(tmp_path)
    each = [{"rotations": ("R1",)}, {"rotations": SUBSETS[-1]}]
    _check(run_ranks(_transformers, 2, tmp_path, {"fsdp_size": 2}, each), {}, each)


def _framework(make: Callable[[], AbstractContextManager[Any]], each: Sequence[Any]) -> Any:
    with make() as made, torch.no_grad():
        return [_turned(made.module, lambda m: made.logits(m, ids()[:, :6]), how) for how in each]


def _megatron(tp: int, kv_heads: int, sequence_parallel: bool) -> Any:
    from frameworks import megatron_gpt

    @contextmanager
    def make() -> Iterator[Any]:
        setting = megatron_gpt.Setting(kv_heads, tp=tp, sequence_parallel=sequence_parallel)
        # 36 is what four ranks can share out.
        with patch.object(megatron_gpt, "VOCABULARY", 36), megatron_gpt.build(setting) as made:
            yield made

    return make()


def _fairscale() -> Any:
    from frameworks import fairscale_llama

    return fairscale_llama.sharded(2)


def _fsdp_on_tensor_parallel() -> Any:
    from frameworks import fsdp_llama

    return fsdp_llama.second_generation_on_tensor_parallel()


@pytest.mark.parametrize(
    ("tp", "kv_heads", "sequence_parallel"),
    [(1, 2, False), (2, 2, False), (2, 1, False), (2, 2, True), (4, 4, False)],
)
def test_megatron(tp: int, kv_heads: int, sequence_parallel: bool) -> None:
    """Catches fused projections taken apart wrongly, LayerNorms and their biases, and traffic.

    The norms are LayerNorms: the head gets their bias. 40 inner features are 2 x 20 over 2 ranks,
    but no multiple of 20 on each of 4: there they are gathered.
    """
    each = [{"rotations": subset} for subset in (("R1", "R2", "R3"), ("R4",), SUBSETS[-1])]
    make = partial(_megatron, tp, kv_heads, sequence_parallel)
    due = {1: {}, 2: {"send": 2, "recv_": 2}, 4: {"_allgather_base_": 2}}[tp]
    for rank in run_ranks(_framework, tp, make, each):
        for how, found in zip(each, rank, strict=True):
            assert found["moved"] <= EXACT, how
            assert found["undone"] <= EXACT, how
            assert found["writing"] == (due if "R4" in how["rotations"] else {}), how


@pytest.mark.parametrize("make", [_fairscale, _fsdp_on_tensor_parallel])
def test_hand_written_models(make: Callable[[], Any]) -> None:
    """Catches layers of fairscale's, DTensors over two mesh dims, and KV heads that ranks share."""
    each = [{"rotations": subset} for subset in (("R1", "R2"), ("R1", "R2", "R4"))]
    size = 2 if make is _fairscale else 4
    for rank in run_ranks(_framework, size, make, each):
        for how, found in zip(each, rank, strict=True):
            assert found["moved"] <= EXACT, how
            assert found["undone"] <= EXACT, how
        if size == 2:
            assert not rank[0]["writing"]


def _along(length: int, rotation: Any, positions: Tensor | None) -> Tensor:
    """A cut activation rotated, its gradient beside it: this rank's part of both."""
    split = Split(Communicator(dist.group.WORLD))
    cut = Cut.of([split], length)
    whole = torch.randn(3, length, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.arange(1.0, 3 * length + 1, dtype=torch.float64).view(3, length)
    x = cut.part(whole, 1).requires_grad_()
    y = turn(x, 1, rotation, cut, positions)
    (y * cut.part(weights, 1)).sum().backward()
    return torch.stack([cut.gathered(t.detach().contiguous(), 1) for t in (y, x.grad)])


@pytest.mark.parametrize(
    ("ranks", "length", "rotation", "blocks"),
    [
        (2, 24, Hadamard(24, torch.arange(24.0) % 3 - 1 + (torch.arange(24) % 3 == 1)), None),
        (4, 64, Hadamard(64), None),
        (4, 12, Hadamard(12), None),
        (2, 24, Dense(random_orthogonal_matrix(8)), None),
        (2, 12, Hadamard(4), torch.tensor([[1, 2, 10, 11]])),
    ],
    ids=["core on each", "pairs", "core cut", "head cut", "scattered"],
)
def test_outputs_and_gradients_are_those_of_the_dense_product(
    ranks: int, length: int, rotation: Any, blocks: Tensor | None
) -> None:
    """Catches a wrong order of exchanges, and a backward that is not the transposed one."""
    matrix = torch.eye(length, dtype=torch.float64)
    for block in torch.arange(length).view(-1, rotation.size) if blocks is None else blocks:
        matrix[block[:, None], block] = rotation.matrix()
    whole = torch.randn(3, length, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.arange(1.0, 3 * length + 1, dtype=torch.float64).view(3, length)
    due = torch.stack([whole @ matrix, weights @ matrix.T])
    for found in run_ranks(_along, ranks, length, rotation, blocks):
        assert relative_error(found, due) <= 1e-12


def _not_managed() -> list[str]:
    from frameworks import fsdp_llama

    found = []
    tied, layered = build("qwen3"), build("opt")
    with fsdp_llama.first_generation(True) as made:
        for model in (made.module, fully_shard(tied), fully_shard(layered)):
            with pytest.raises(FlexModelError) as raised:
                rotate(model, rotations=("R1",))
            found.append(str(raised.value))
    return found


def test_fully_sharded_models_that_are_refused() -> None:
    """Catches parts of flat tensors rotated as weights, and parameters that FSDP2 never sees."""
    for flat, tied, layered in run_ranks(_not_managed, 2):
        assert "FSDP1 keeps weights" in flat
        assert "FSDP2 manages" in tied
        assert "FSDP2 manages" in layered
