"""A run that is killed at any moment and resumed ends with the uninterrupted run's very bits."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from scored_models import (
    TARGETS,
    Scores,
    assert_close,
    assert_equal,
    plain_scores,
    tensor_parallel,
    token_batches,
    whole,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flex_model import FlexModel
from flex_model.errors import ImportanceError
from flex_model.importance import Target, files, hooks_for, score
from flex_model.testing.ranks import RankFailure, run_ranks

EVERY = 2
L2 = (Target("layers.*.down", "l2"),)
# On rows that tensor parallelism cuts there is nothing to score "independent"ly.
SHARDED = tuple(target for target in TARGETS if target.kind != "independent")


# -- killed ------------------------------------------------------------------------------------


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _job(layout: str, rank: int) -> tuple[nn.Module, list[Tensor], tuple[Target, ...]]:
    if layout == "tp":
        return tensor_parallel(), token_batches(), SHARDED
    model = FlexModel(whole(), {}, data_parallel_size=2)
    cuts = [(3, 1)] * 6 + [(1, 1)]
    mine = [b.split(cut)[rank] for b, cut in zip(token_batches(), cuts, strict=True)]
    return model, mine, TARGETS


def _dying_at(batches: list[Tensor], number: int) -> Iterator[Tensor]:
    for at, batch in enumerate(batches):
        if at == number:
            _die()
        yield batch


def _half_a_file(path: Path, found: Any) -> None:
    """The second checkpoint's, written in part."""
    _WRITE(path, found)
    if "step_000004" in str(path):
        os.truncate(path, path.stat().st_size // 2)
        _die()


def _dying_at_call(number: int) -> Callable[..., None]:
    calls = iter(range(number + 1))

    def hook(*_: Any) -> None:
        if next(calls) == number:
            _die()

    return hook


_WRITE, _REPLACE, _JSON = files.write, os.replace, files.write_json


def _before_renaming(source: Any, target: Any) -> None:
    if "step_000004" in str(target):
        _die()
    _REPLACE(source, target)


def _after_renaming(source: Any, target: Any) -> None:
    _REPLACE(source, target)
    if "step_000004" in str(target):
        _die()


def _without_manifest(path: Path, found: Any) -> None:
    _JSON(path, found)
    if "step_000004" in str(path):
        _die()


def _half_removed(folder: Path, **_: Any) -> None:
    """Behind the fourth batch's checkpoint, the second's is being removed."""
    if "step_000002" in str(folder):
        next(Path(folder).glob("rank_*")).unlink()
        _die()


def _die_in_place(*_: Any) -> None:
    _die()


_PATCHES: dict[str, tuple[str, Callable[..., Any]]] = {
    "writing": ("flex_model.importance.files.write", _half_a_file),
    "before renaming": ("os.replace", _before_renaming),
    "after renaming": ("os.replace", _after_renaming),
    "writing the manifest": ("flex_model.importance.files.write_json", _without_manifest),
    "removing the one before": ("shutil.rmtree", _half_removed),
    "gathering the scores": ("flex_model.importance.L2NormHook.to_dict", _die_in_place),
}
_BATCHES = {"before the first": 1, "between": 5}


def _killed(layout: str, moment: str, rank: int, folder: Path) -> None:
    model, batches, targets = _job(layout, dist.get_rank())
    mine = dist.get_rank() == rank
    given: Any = batches
    if mine and moment in _BATCHES:
        given = _Counted(_dying_at(batches, _BATCHES[moment]), len(batches))
    if mine and moment == "in the forward":
        model.layers[1].up.register_forward_hook(_dying_at_call(5))
    with ExitStack() as stack:
        if mine and moment in _PATCHES:
            stack.enter_context(patch(*_PATCHES[moment]))
        score(model, given, targets, folder, EVERY)


class _Counted:
    def __init__(self, batches: Iterator[Tensor], length: int) -> None:
        self._batches = batches
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Tensor]:
        return self._batches


def _finished(layout: str, folder: Path | None) -> tuple[Scores, int]:
    """The scores, and how many batches the model ran."""
    model, batches, targets = _job(layout, dist.get_rank())
    calls = []
    root = model.module if isinstance(model, FlexModel) else model
    nn.Module.register_forward_hook(root, lambda *call: calls.append(1))
    return score(model, batches, targets, folder, EVERY), len(calls)


_UNINTERRUPTED: dict[str, list[tuple[Scores, int]]] = {}


def _uninterrupted(layout: str) -> list[tuple[Scores, int]]:
    if layout not in _UNINTERRUPTED:
        _UNINTERRUPTED[layout] = run_ranks(_finished, 2, layout, None)
    return _UNINTERRUPTED[layout]


MOMENTS = [
    ("tp", "in the forward", 0, 3),
    ("dp", "before the first", 1, 7),
    ("dp", "between", 0, 3),
    ("tp", "between", 1, 3),
    ("tp", "writing", 0, 5),
    ("dp", "writing", 1, 5),
    ("dp", "before renaming", 0, 5),
    ("tp", "after renaming", 0, 5),  # its file is there, the manifest is not
    ("dp", "after renaming", 1, 5),
    ("dp", "writing the manifest", 0, 5),
    ("tp", "removing the one before", 0, 3),
    ("dp", "gathering the scores", 1, 0),
]


@pytest.mark.parametrize(("layout", "moment", "rank", "left"), MOMENTS)
def test_a_killed_run_resumes_to_the_bit(
    layout: str, moment: str, rank: int, left: int, tmp_path: Path
) -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(_killed, 2, layout, moment, rank, tmp_path, fresh=True)
    kinds = {at: failure.kind for at, failure in caught.value.failures.items()}
    assert kinds == {rank: "Died", 1 - rank: "RankFailedError"}, caught.value
    resumed = run_ranks(_finished, 2, layout, tmp_path)
    for (found, calls), (due, _) in zip(resumed, _uninterrupted(layout), strict=True):
        assert_equal(found, due)
        assert calls == left
    assert [path.name for path in tmp_path.iterdir()] == ["step_000007"]


@pytest.mark.parametrize("layout", ["tp", "dp"])
def test_the_uninterrupted_run_is_one_process(layout: str) -> None:
    """What all of the above are compared with, against the truth."""
    due = plain_scores(token_batches(), SHARDED if layout == "tp" else TARGETS)
    for found, calls in _uninterrupted(layout):
        assert_close(found, due)
        assert calls == 7


# -- one process -------------------------------------------------------------------------------


def _interrupted(folder: Path, done: int = 5, every: Any = EVERY, **others: Any) -> None:
    """A run that ends for another reason than being killed, in the midst."""
    batches = _Counted(_failing_at(token_batches(), done), 7)
    with pytest.raises(ImportanceError, match="the loader broke"):
        score(others.get("model", whole()), batches, others.get("targets", TARGETS), folder, every)


def _failing_at(batches: list[Tensor], number: int) -> Iterator[Tensor]:
    yield from batches[:number]
    raise ValueError("the loader broke")


@pytest.mark.parametrize("done", [0, 1, 2, 3, 4, 5, 6, 7])
def test_an_interrupted_run_resumes_to_the_bit(done: int, tmp_path: Path) -> None:
    _interrupted(tmp_path, done)
    found = score(whole(), token_batches(), TARGETS, tmp_path, EVERY)
    assert_equal(found, score(whole(), token_batches(), TARGETS))


def test_a_finished_run_runs_nothing_more(tmp_path: Path) -> None:
    first = score(whole(), token_batches(), TARGETS, tmp_path, 3)
    model, calls = whole(), []
    model.register_forward_hook(lambda *call: calls.append(1))
    assert_equal(score(model, token_batches(), TARGETS, tmp_path, 3), first)
    assert not calls


def test_a_time_may_tell_when(tmp_path: Path) -> None:
    """So short a time that it is due at every batch."""
    _interrupted(tmp_path, 5, "0.000001s")
    assert (tmp_path / "step_000004" / "manifest.json").exists()


def test_a_loader_that_shuffles_by_a_seed(tmp_path: Path) -> None:
    def loader(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        data = TensorDataset(torch.cat(token_batches()))
        return DataLoader(data, batch_size=4, shuffle=True, generator=generator)

    def broken(batches: Any) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            if number == 5:
                raise ValueError("the loader broke")
            yield batch

    with pytest.raises(ImportanceError, match="the loader broke"):
        score(whole(), broken(loader(0)), L2, tmp_path, EVERY)
    with pytest.raises(ImportanceError, match="the first 4 batches are others"):
        score(whole(), loader(1), L2, tmp_path, EVERY)
    assert_equal(score(whole(), loader(0), L2, tmp_path, EVERY), score(whole(), loader(0), L2))


def test_hooks_are_untouched_by_a_checkpoint_that_is_refused(tmp_path: Path) -> None:
    _interrupted(tmp_path, targets=L2)
    hooks = hooks_for(whole(), L2)
    with pytest.raises(ImportanceError, match="others than those"):
        score(whole(), token_batches(seed=6), hooks, tmp_path, EVERY)
    assert all(total.empty for hook in hooks.values() for total in hook.sums.values())


def _with_a_parameter_more() -> nn.Module:
    model = whole()
    model.more = nn.Parameter(torch.ones(2))
    return model


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ITERATIVE = (Target("layers.*.down", "iterative", {"validation_full_iters": 7}),)


@pytest.mark.parametrize(
    ("model", "targets", "batches", "told"),
    [
        (whole(seed=4), L2, token_batches(), "another model: .* other weights"),
        (_with_a_parameter_more(), L2, token_batches(), "another model: it has no parameter more"),
        (nn.Sequential(nn.Linear(3, 3)), (Target("0", "l2"),), [torch.ones(1, 2, 3)],
         "another model: a scored_models.Tiny"),
        (whole(), ITERATIVE, token_batches(), "another set of hooks: its hook layers.0.down was"),
        (whole(), (*L2, Target("layers.*.norm", "hidden")), token_batches(),
         "another set of hooks: it has no hook layers.0.norm"),
        (whole(), (Target("layers.0.down", "l2"),), token_batches(),
         "its hook layers.1.down is not in this run"),
        (whole(), (Target("layers.*.down", "l2", {"per_token": True}),), token_batches(),
         "'per_token': False.*, here .*'per_token': True"),
        (whole(), L2, token_batches(seed=6), "the first 4 batches are others"),
        (whole(), L2, token_batches(3), "the checkpoint has 4 batches, but here are 3"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_run(
    model: nn.Module, targets: Any, batches: Any, told: str, tmp_path: Path
) -> None:
    _interrupted(tmp_path, targets=L2)
    before = _snapshot(tmp_path)
    with pytest.raises(ImportanceError, match=told):
        score(model, batches, targets, tmp_path, EVERY)
    assert _snapshot(tmp_path) == before


def test_another_schedule_is_another_set_of_hooks(tmp_path: Path) -> None:
    _interrupted(tmp_path, targets=ITERATIVE)
    other = (Target("layers.*.down", "iterative", {"validation_full_iters": 8}),)
    with pytest.raises(ImportanceError, match="'pruning_iters': 7"):
        score(whole(), token_batches(), other, tmp_path, EVERY)


def _truncate(step: Path) -> None:
    os.truncate(step / "rank_0.safetensors", 300)


def _other_file(step: Path) -> None:
    save_file({"a": torch.ones(2)}, step / "rank_0.safetensors")


def _remove(step: Path) -> None:
    (step / "rank_0.safetensors").unlink()


def _empty_manifest(step: Path) -> None:
    (step / "manifest.json").write_text("")


@pytest.mark.parametrize("harm", [_truncate, _other_file, _remove, _empty_manifest])
def test_a_damaged_checkpoint_is_named(harm: Callable[[Path], None], tmp_path: Path) -> None:
    """It is not passed over: a run that silently began anew would lose what can be mended."""
    _interrupted(tmp_path, targets=L2)
    harm(tmp_path / "step_000004")
    before = _snapshot(tmp_path)
    with pytest.raises(ImportanceError, match="step_000004 cannot be resumed"):
        score(whole(), token_batches(), L2, tmp_path, EVERY)
    assert _snapshot(tmp_path) == before


# -- ranks -------------------------------------------------------------------------------------


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    _interrupted(tmp_path, targets=L2)
    first, second = run_ranks(_refused, 2, tmp_path)
    assert first == second
    assert "was made on 1 rank(s), this run has 2 rank(s) (dp=2)" in first


def _refused(folder: Path) -> str:
    model, batches, _ = _job("dp", dist.get_rank())
    with pytest.raises(ImportanceError) as caught:
        score(model, batches, L2, folder, EVERY)
    return str(caught.value)


def _one_rank_harmed(folder: Path) -> str:
    model, batches, _ = _job("dp", dist.get_rank())
    score(model, batches, L2, folder, EVERY)
    if dist.get_rank() == 1:
        os.truncate(folder / "step_000007" / "rank_1.safetensors", 200)
    return _refused(folder)


def test_one_rank_s_damaged_file_is_named_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(_one_rank_harmed, 2, tmp_path)
    assert first == second
    assert "rank 1" in first
    assert "rank_1.safetensors" in first


def _own_folders(folder: Path) -> str:
    if dist.get_rank() == 0:
        (folder / "0" / "step_000002").mkdir(parents=True)
        (folder / "0" / "step_000002" / "manifest.json").write_text("{}")
    dist.barrier()
    return _refused(folder / str(dist.get_rank()))


def test_a_folder_that_ranks_do_not_share(tmp_path: Path) -> None:
    first, second = run_ranks(_own_folders, 2, tmp_path)
    assert "{0: 2, 1: -1}" in first
    assert "{0: 2, 1: -1}" in second


def _full_disk(folder: Path) -> tuple[str, Scores]:
    model, batches, targets = _job("dp", dist.get_rank())

    def fails(path: Path, found: Any) -> None:
        if "step_000004" in str(path) and dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        _WRITE(path, found)

    with (
        patch("flex_model.importance.files.write", fails),
        pytest.raises(ImportanceError) as caught,
    ):
        score(model, batches, targets, folder, EVERY)
    kept = sorted(path.parent.name for path in folder.glob("*/manifest.json"))
    assert kept == ["step_000002"]
    facts = json.loads((folder / "step_000002" / "manifest.json").read_text())
    assert facts["mesh"]["dp"] == 2
    dist.barrier()
    return str(caught.value), score(model, batches, targets, folder, EVERY)


def test_a_full_disk_is_named_and_the_run_can_go_on(tmp_path: Path) -> None:
    (first, found), (second, _) = run_ranks(_full_disk, 2, tmp_path)
    assert first == second
    assert "rank 1: OSError: [Errno 28] No space left" in first
    assert_equal(found, _uninterrupted("dp")[0][0])
