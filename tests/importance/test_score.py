"""`score`: one pass of many kinds of hooks, compared with a plain loop in one process."""

import io
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from scored_models import (
    HIDDEN,
    TARGETS,
    VOCABULARY,
    assert_close,
    assert_equal,
    plain_scores,
    tensor_parallel,
    token_batches,
    whole,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flex_model import FlexModel, HookFunction
from flex_model.errors import ImportanceError, UnknownModuleError
from flex_model.importance import L2NormHook, Target, hooks_for, score
from flex_model.importance.run.every import Every
from flex_model.importance.run.targets import kind_of
from flex_model.testing.ranks import run_ranks

L2 = (Target("layers.*.down", "l2"),)


# -- one process -------------------------------------------------------------------------------


def test_many_kinds_in_one_pass() -> None:
    """Catches a kind that another one on the same module displaces, or disturbs."""
    batches = token_batches()
    found = score(whole(), batches, TARGETS)
    assert_close(found, plain_scores(batches))
    assert {key for key in found if key.startswith("layers.1")} == {
        "layers.1", "layers.1.up",
        "layers.1.down#iterative", "layers.1.down#l2", "layers.1.down#kv_heads",
        "layers.1.norm#layer_norm", "layers.1.norm#hidden",
    }  # fmt: skip


def test_hooks_given_are_those_that_are_filled() -> None:
    hooks = {"layers.0.down": L2NormHook(1)}
    found = score(whole(), token_batches(), hooks)
    torch.testing.assert_close(hooks["layers.0.down"].accumulate(), found["layers.0.down"]["score"])


def test_kinds_are_told_by_their_hooks() -> None:
    hooks = hooks_for(whole(), TARGETS, 3)
    assert {kind_of(hook) for hook in hooks.values()} == {target.kind for target in TARGETS}


@pytest.mark.parametrize("how", ["tensor", "tuple", "mapping", "loader"])
def test_batches_of_any_form(how: str) -> None:
    plain = token_batches()
    forms: dict[str, Any] = {
        "tensor": plain,
        "tuple": [(batch,) for batch in plain],
        "mapping": ({"input_ids": batch} for batch in plain),  # of no length
        "loader": DataLoader(TensorDataset(torch.cat(plain)), batch_size=4),  # ragged at the end
    }
    targets = tuple(target for target in TARGETS if target.kind != "iterative")
    assert_close(score(whole(), forms[how], targets), plain_scores(plain, targets))


def _padded() -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Batches with padding, and each sample without its padding."""
    batches, samples = [], []
    for ids in token_batches(5):
        mask = torch.ones_like(ids)
        for row in range(len(ids)):
            mask[row, : row % 4] = 0
            samples.append(ids[row : row + 1, row % 4 :])
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches, samples


def test_padding_counts_for_nothing() -> None:
    """Means over samples, against each sample alone without its padding."""
    batches, samples = _padded()
    assert_close(score(whole(), batches, L2), plain_scores(samples, L2))


def test_padding_counts_for_nothing_in_means_over_tokens() -> None:
    """Means over a batch's tokens, against its real tokens as one sequence."""
    batches, _ = _padded()
    packed = [b["input_ids"][b["attention_mask"].bool()].view(1, -1) for b in batches]
    targets = tuple(target for target in TARGETS if target.kind != "l2")
    assert_close(score(whole(), batches, targets), plain_scores(packed, targets))


def test_a_mask_of_ones_is_none() -> None:
    batches = token_batches()
    masked = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]
    assert_equal(score(whole(), masked, TARGETS), score(whole(), batches, TARGETS))


def _forward_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    """Catches hooks or modes that stay behind, after an error too."""
    model = whole()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    batches: list[Any] = [*token_batches(), *(["no batch"] if fails else [])]
    if fails:
        with pytest.raises(ImportanceError, match="got str"):
            score(model, batches, L2)
    else:
        score(model, batches, L2)
    assert [module.training for module in model.modules()] == modes
    assert _forward_hooks(model) == 0


def test_a_flex_model_keeps_its_own_hooks() -> None:
    records: dict[str, list[Tensor]] = {}
    model = FlexModel(whole(), records)
    model.register_forward_hook(HookFunction("layers.0.up"))
    batches = token_batches()
    assert_close(score(model, batches, L2), plain_scores(batches, L2))
    before = len(records["layers.0.up"])
    model(batches[0])
    assert (before, len(records["layers.0.up"])) == (len(batches), len(batches) + 1)
    assert _forward_hooks(model.restore()) == 0


def test_scores_keep_no_graph() -> None:
    score(model := whole(), token_batches(), TARGETS)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_progress_is_shown_with_the_time_left() -> None:
    told = io.StringIO()
    console = Console(file=told, force_terminal=True, width=120)
    score(whole(), token_batches(), L2, console=console)
    assert "scoring by 3 hooks" in told.getvalue()
    assert "7/7" in told.getvalue()


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "error", "told"),
    [
        ([Target("layers.*.dwn", "l2")], UnknownModuleError, r"Nearest: layers\.\d\.down"),
        ([*L2, Target("layers.0.down", "l2")], ImportanceError, "layers.0.down is named twice"),
        ([Target("layers.0.norm", "iterative")], ImportanceError, "layers.0.norm .*no linear"),
        ([Target("layers.0.down", "iterative", {"x": 1})], ImportanceError, r"option \['x'\]"),
        ([Target("layers.0.down", "l2", {"x": 1})], ImportanceError, "layers.0.down .*'x'"),
        ([], ImportanceError, "no hooks"),
        ({"layers.0.down": print}, ImportanceError, "must have a ForwardHook"),
        ({"layers.9": L2NormHook()}, UnknownModuleError, "layers.9"),
    ],
)
def test_hooks_that_cannot_be(targets: Any, error: type[Exception], told: str) -> None:
    model = whole()
    with pytest.raises(error, match=told):
        score(model, token_batches(), targets)
    assert _forward_hooks(model) == 0


def test_a_kind_that_is_none() -> None:
    with pytest.raises(ImportanceError, match="There are l2, megatron_l2"):
        Target("*", "l3")


def test_no_batches() -> None:
    with pytest.raises(ImportanceError, match="no batches"):
        score(whole(), [], L2)


@pytest.mark.parametrize(
    ("given", "due"),
    [
        (3, Every(batches=3)),
        ("3", Every(batches=3)),
        ("90s", Every(seconds=90)),
        ("1.5h", Every(seconds=5400)),
        (timedelta(minutes=2), Every(seconds=120)),
    ],
)
def test_intervals(given: Any, due: Every) -> None:
    assert Every.of(given) == due


@pytest.mark.parametrize("given", [0, -1, True, "", "10", "soon", "0m", timedelta(0), None, 1.5])
def test_intervals_that_are_none(given: Any) -> None:
    if given == "10":
        assert Every.of(given).batches == 10
        return
    with pytest.raises(ImportanceError, match="no interval"):
        Every.of(given)


def _with_nan(batches: list[Tensor], at: int) -> list[Any]:
    """Ids of which one is of a token whose embedding is no number (see `_poisoned`)."""
    for number, batch in enumerate(batches):
        batch.clamp_(max=VOCABULARY - 2)
        if number == at:
            batch[0, 0] = VOCABULARY - 1
    return batches


def _poisoned() -> nn.Module:
    model = whole()
    model.embed.weight.data[VOCABULARY - 1] = torch.nan
    return model


@pytest.mark.parametrize("kind", ["l2", "independent", "iterative", "kv_heads"])
@pytest.mark.parametrize("at", [0, 3, 6])
def test_nans_are_named_and_stay_off_the_disk(kind: str, at: int, tmp_path: Path) -> None:
    """The last batch too, which no batch comes after."""
    targets = [Target("layers.*.down", kind)]
    with pytest.raises(ImportanceError, match=rf"Batch {at}: .*layers\.0\.down"):
        score(_poisoned(), _with_nan(token_batches(), at), targets, tmp_path, every=1)
    assert [path.name for path in tmp_path.iterdir()] == ([f"step_{at:06d}"] if at else [])


# -- ranks -------------------------------------------------------------------------------------


def _share(batches: list[Tensor]) -> list[Tensor]:
    """This data-parallel rank's rows: three to one, and one to one in the ragged last batch."""
    cuts = [(3, 1)] * (len(batches) - 1) + [(1, 1)]
    return [b.split(cut)[dist.get_rank()] for b, cut in zip(batches, cuts, strict=True)]


def _data_parallel_run(how: str) -> Any:
    model = FlexModel(whole(), {}, data_parallel_size=dist.get_world_size())
    if how == "padding":
        batches, mine = _padded()[0], []
        for batch in batches:
            half = len(batch["input_ids"]) // 2
            mine.append({k: v.split(half)[dist.get_rank()] for k, v in batch.items()})
        return score(model, mine, TARGETS)
    return score(model, _share(token_batches()), TARGETS)


def test_data_parallel_is_one_process_with_all_batches() -> None:
    due = plain_scores(token_batches())
    for found in run_ranks(_data_parallel_run, 2, "ragged"):
        assert_close(found, due)


def test_data_parallel_with_padding() -> None:
    """Catches means over each rank's own real tokens."""
    due = score(whole(), _padded()[0], TARGETS)
    for found in run_ranks(_data_parallel_run, 2, "padding"):
        assert_close(found, due)


def _tensor_parallel_run(masked: bool) -> Any:
    targets = [target for target in TARGETS if target.kind != "independent"]  # not on cut rows
    return score(tensor_parallel(), _padded()[0] if masked else token_batches(), targets)


@pytest.mark.parametrize("masked", [False, True])
def test_tensor_parallel(masked: bool) -> None:
    targets = tuple(target for target in TARGETS if target.kind != "independent")
    due = score(whole(), _padded()[0] if masked else token_batches(), targets)
    for found in run_ranks(_tensor_parallel_run, 2, masked):
        assert_close(found, due)


def _failing_run(how: str) -> str:
    rank = dist.get_rank()
    model = FlexModel(whole(), {}, data_parallel_size=2)
    batches: Any = _share(token_batches())
    if how == "nan":
        model.module.embed.weight.data[VOCABULARY - 1] = torch.nan
        batches = _with_nan(batches, 2 if rank == 1 else -1)
    elif how == "fewer":
        batches = batches[: 5 - rank]
    elif how == "loader" and rank == 1:
        batches = (_broken() if n == 2 else batch for n, batch in enumerate(batches))
    elif how == "mask" and rank == 0:
        batches = [{"input_ids": b, "attention_mask": torch.ones_like(b)} for b in batches]
    elif how == "form" and rank == 1:
        batches[1] = "words"
    elif how == "empty":
        batches = []
    with pytest.raises(ImportanceError) as caught:
        score(model, batches, L2)
    # A named error leaves a job that goes on.
    again = score(model, _with_nan(_share(token_batches()), -1), L2)
    assert "layers.0.down" in again
    return str(caught.value)


def _broken() -> Tensor:
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("nan", r"Batch 2: activations of layers.0.down .* rank\(s\) \[1\]"),
        ("fewer", r"Rank\(s\) \[1\] have no batch 4"),
        ("loader", "Batch 2: rank 1: OSError: the disk is gone"),
        ("mask", r"Rank\(s\) \[1\] have no attention_mask"),
        ("form", "Batch 1: rank 1: .*got str"),
        ("empty", "no batches"),
    ],
)
def test_what_fails_on_one_rank_is_raised_alike_on_all(how: str, told: str) -> None:
    first, second = run_ranks(_failing_run, 2, how)
    assert first == second
    assert re.search(told, first), first


def _nan_in_one_shard() -> str:
    """A channel's activations on the second rank alone."""
    model = tensor_parallel()
    if dist.get_rank() == 1:
        model.layers[2].up.bias.to_local().data[-1] = torch.inf
    with pytest.raises(ImportanceError) as caught:
        score(model, token_batches(), [Target("layers.2.down", "l2")])
    return str(caught.value)


def test_nans_in_one_shard_are_raised_on_all_ranks() -> None:
    first, second = run_ranks(_nan_in_one_shard, 2)
    assert first == second
    assert "layers.2.down" in first
    assert "[1]" in first


def _asked_late() -> float:
    model = tensor_parallel()
    hooks = hooks_for(model, L2)
    score(model, token_batches(), hooks)
    if dist.get_rank() == 1:
        time.sleep(4.5)  # longer than a rank that took its hooks off is waited for
    return float(hooks["layers.0.down"].accumulate().sum())


def test_hooks_can_be_asked_after_the_run() -> None:
    """Catches a rank that counts as gone since its model was restored."""
    first, second = run_ranks(_asked_late, 2)
    assert first == second


def test_hidden_sizes_are_scored_alike_by_norms() -> None:
    found = score(whole(), token_batches(), [Target("layers.*.norm", "hidden")])
    assert all(named["score"].shape == (HIDDEN,) for named in found.values())


# -- experts -----------------------------------------------------------------------------------


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, use_cache=False,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def test_experts_pass_over_padding() -> None:
    """On the right, where a causal model's real tokens do not see it: as if it were not there."""
    batches, rows = [], []
    for ids in token_batches(3):
        mask = torch.ones_like(ids)
        mask[:, 3:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
        rows.append({"input_ids": ids[:, :3]})
    targets = [Target("model.layers.*.mlp.experts", "experts")]
    found = score(_mixtral(), batches, targets)
    assert found["model.layers.1.mlp.experts"]["score"].shape == (4,)
    assert_close(found, score(_mixtral(), rows, targets))


# -- Megatron ----------------------------------------------------------------------------------

MEGATRON = (
    Target("decoder.layers.*.mlp.linear_fc2", "l2"),
    Target("decoder.layers.*.mlp.linear_fc2", "iterative"),
    Target("decoder.layers.*.self_attention.linear_proj", "kv_heads"),
    Target("decoder.layers.*.self_attention.linear_proj", "heads"),
    Target("decoder.layers.*.input_layernorm", "hidden"),
    Target("decoder.layers.?", "layers"),
)


def _megatron_run(tp: int, sequence_parallel: bool) -> Any:
    from frameworks.megatron_gpt import VOCABULARY as IDS
    from frameworks.megatron_gpt import Setting, build

    causal = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
    stream = torch.Generator().manual_seed(1)
    batches = [
        (torch.randint(IDS, (size, 8), generator=stream), torch.arange(8).expand(size, 8), causal)
        for size in (3, 3, 2)
    ]
    with build(Setting(tp=tp, sequence_parallel=sequence_parallel)) as model:
        return score(model.module, batches, MEGATRON)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_megatron(sequence_parallel: bool) -> None:
    """Sequences lie along the first dim, and heads are told under other names."""
    (due,) = run_ranks(_megatron_run, 1, 1, False)
    assert due["decoder.layers.0.self_attention.linear_proj#kv_heads"]["score"].shape == (2,)
    for found in run_ranks(_megatron_run, 2, 2, sequence_parallel):
        assert_close(found, due)
