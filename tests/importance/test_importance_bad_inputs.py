"""Every mistake is refused by name, and leaves what was collected as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from flex_model import FlexModel, LocalShard
from flex_model.distributed.mesh import ParallelMesh
from flex_model.errors import ImportanceError, NothingCollectedError
from flex_model.importance import (
    AttentionHeadHook,
    ForwardHook,
    Heads,
    IndependentChannelContributionHook,
    IndependentKvHeadContributionHook,
    IterativeChannelContributionHook,
    L2NormHook,
    LayerNormContributionHook,
    LayerSimilarityHook,
    PaddingMask,
    dump_scores,
    evaluate_importance_scores,
    load_scores,
    load_states,
    save_states,
)
from flex_model.importance.sharded_sum import ShardedSum
from flex_model.layouts.layout import ActivationLayout, DimLayout
from flex_model.testing.ranks import run_ranks

ITERATIONS = {"validation_full_iters": 3}


def _linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(6, 4)


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _kv(heads: int = 3, kv_heads: int = 3, **changed: Any) -> IndependentKvHeadContributionHook:
    config = SimpleNamespace(num_attention_heads=heads, hidden_size=6)
    kwargs = {
        "model": SimpleNamespace(config=config),
        "block_config": SimpleNamespace(attention=SimpleNamespace(num_key_value_heads=kv_heads)),
    }
    return IndependentKvHeadContributionHook(_linear(), kwargs | changed)


def _iterative(**changed: Any) -> IterativeChannelContributionHook:
    return IterativeChannelContributionHook(_linear(), ITERATIONS | changed)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: IndependentChannelContributionHook(nn.LayerNorm(4)), "no linear layer"),
        (lambda: IterativeChannelContributionHook(nn.ReLU(), ITERATIONS), "no linear layer"),
        (lambda: LayerNormContributionHook(nn.Linear(3, 3), {}), "no norm"),
        (lambda: LayerNormContributionHook(nn.LayerNorm(3, elementwise_affine=False)), "no norm"),
        (lambda: IterativeChannelContributionHook(_linear(), {}), "needs validation_full_iters"),
        (lambda: _iterative(validation_full_iters=0), "must be 1 or more, got 0"),
        (lambda: _iterative(validation_full_iters=True), "must be 1 or more"),
        (lambda: _iterative(validation_full_iters=2.5), "must be 1 or more"),
        (lambda: _iterative(calibration_method="loudest"), "calibration_method must be one of"),
        (lambda: _kv(optimize_for="speed"), "optimize_for must be"),
        (lambda: _kv(heads=3, kv_heads=2), "do not divide into 2 key-value groups"),
        (lambda: _kv(heads=2, kv_heads=0), "do not divide"),
        (lambda: _kv(block_config=None), "needs model"),
        (lambda: AttentionHeadHook(_linear(), Heads(2, 2, 4)), "make 8"),
        (lambda: L2NormHook(2), "sequence_dim must be 0 or 1"),
        (lambda: L2NormHook(side="both"), "side must be"),  # type: ignore[arg-type]
    ],
)
def test_hooks_that_cannot_be_made(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ImportanceError, match=says):
        make()


def test_a_head_width_of_none_is_read_off_the_hidden_size() -> None:
    """As transformers' configs may have it."""
    config = SimpleNamespace(num_attention_heads=3, hidden_size=6, head_dim=None)
    assert Heads.of(config) == Heads(3, 3, 2)


HOOKS: dict[str, Callable[[], ForwardHook]] = {
    "l2": L2NormHook,
    "independent": lambda: IndependentChannelContributionHook(_linear()),
    "iterative": _iterative,
    "kv": _kv,
    "norm": lambda: LayerNormContributionHook(nn.LayerNorm(6), {}),
    "layers": LayerSimilarityHook,
}


def _call(hook: ForwardHook, x: Tensor | None = None) -> None:
    x = _x(5, 2, 6) if x is None else x
    # The similarity of layers compares with something of the same shape.
    hook(_linear(), (x,), x.flip(0))


@pytest.mark.parametrize("name", HOOKS)
def test_nothing_collected(name: str) -> None:
    """An AssertionError too, as the reference's contract has it."""
    hook = HOOKS[name]()
    with pytest.raises(NothingCollectedError):
        hook.accumulate()
    with pytest.raises(AssertionError):
        hook.to_dict()


def _bad_states(state: dict[str, Any]) -> dict[str, Any]:
    """By what is wrong with it."""
    name = next(key for key, value in state.items() if isinstance(value, Tensor))
    value: Tensor = state[name]
    return {
        "no state": None,
        "a key missing": {k: v for k, v in state.items() if k != name},
        "a key too many": {**state, "more": 1},
        "no vector": {**state, name: value.unsqueeze(0)},
        "no tensor": {**state, name: value.tolist()},
        "NaN": {**state, name: value * torch.nan},
    }


@pytest.mark.parametrize("what", _bad_states({"x": torch.ones(2)}))
@pytest.mark.parametrize("name", HOOKS)
def test_states_that_do_not_fit(name: str, what: str) -> None:
    """Refused, and the hook goes on as if nothing had been loaded."""
    hook, other = HOOKS[name](), HOOKS[name]()
    _call(hook)
    _call(other)
    with pytest.raises(ImportanceError):
        hook.load_state_dict(_bad_states(hook.state_dict())[what])
    _call(hook)
    _call(other)
    for key, value in other.state_dict().items():
        found = hook.state_dict()[key]
        assert torch.equal(found, value) if isinstance(value, Tensor) else found == value


@pytest.mark.parametrize("name", ["independent", "iterative", "kv", "norm"])
def test_the_state_of_another_size(name: str) -> None:
    hook = HOOKS[name]()
    _call(hook)
    state = hook.state_dict()
    long = {k: torch.cat((v, v)) if isinstance(v, Tensor) else v for k, v in state.items()}
    with pytest.raises(ImportanceError, match="entries, but the layer has"):
        hook.load_state_dict(long)


def test_the_state_of_other_weights() -> None:
    hook = IndependentChannelContributionHook(_linear())
    _call(hook)
    torch.manual_seed(3)
    with pytest.raises(ImportanceError, match="weight_norm mismatch"):
        IndependentChannelContributionHook(nn.Linear(6, 4)).load_state_dict(hook.state_dict())


@pytest.mark.parametrize(
    "changed",
    [
        {"pruning_iters": 4},
        {"calibration_method": "scale_by_magnitude"},
        {"curr_iter": 9},
        {"pruned_channels": [1, 1]},
        {"pruned_channels": [99]},
    ],
)
def test_a_state_that_cannot_be(changed: dict[str, Any]) -> None:
    hook = _iterative()
    _call(hook)
    before = hook.state_dict()
    with pytest.raises(ImportanceError):
        hook.load_state_dict(before | changed)
    assert hook.state_dict()["pruned_channels"] == before["pruned_channels"]


def test_a_state_is_a_copy() -> None:
    for make in HOOKS.values():
        hook = make()
        _call(hook)
        state = hook.state_dict()
        kept = {k: v.clone() if isinstance(v, Tensor) else str(v) for k, v in state.items()}
        _call(hook)
        for key, value in kept.items():
            now = state[key] if isinstance(value, Tensor) else str(state[key])
            assert torch.equal(now, value) if isinstance(value, Tensor) else now == value


def test_one_call_too_many() -> None:
    hook = _iterative(validation_full_iters=1)
    _call(hook)
    ranks = hook.accumulate()
    with pytest.raises(ImportanceError, match="call 2, but validation_full_iters=1"):
        _call(hook)
    assert torch.equal(hook.accumulate(), ranks)


def test_unfinished() -> None:
    hook = _iterative()
    _call(hook)
    with pytest.raises(NothingCollectedError, match="2 of 6 channels are ranked after 1 of 3"):
        hook.accumulate()


def test_nan_activations() -> None:
    bad = _x(5, 2, 6)
    bad[0, 0, 0] = torch.nan
    for name in ("l2", "independent", "kv", "norm"):
        hook = HOOKS[name]()
        _call(hook)
        assert hook.healthy
        _call(hook, bad)
        assert not hook.healthy
        with pytest.raises(ImportanceError, match="NaN"):
            hook.accumulate()
    iterative = _iterative()
    with pytest.raises(ImportanceError, match="activations of call 1"):
        _call(iterative, bad)
    assert iterative.pruned == []


def test_channels_that_cancel_stay_numbers() -> None:
    """Weights all one, channels that nearly cancel: rounding must not make a root of less than
    zero."""
    layer = nn.Linear(4, 1, bias=False).bfloat16()
    nn.init.ones_(layer.weight)
    hook = IterativeChannelContributionHook(layer, {"validation_full_iters": 4})
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0]]).repeat(3, 1, 1).bfloat16()
    for _ in range(4):
        hook(layer, (x,), layer(x))
    assert sorted(hook.pruned) == [0, 1, 2, 3]


def test_activations_of_no_use() -> None:
    with pytest.raises(ImportanceError, match="has no tokens"):
        _call(HOOKS["independent"](), _x(6))
    with pytest.raises(ImportanceError, match="neither"):
        L2NormHook()(nn.Identity(), (_x(2, 2, 2, 6),), None)
    with pytest.raises(ImportanceError, match="no tensor as its input"):
        L2NormHook()(nn.Identity(), (), None)
    with pytest.raises(ImportanceError, match="residual stream"):
        LayerSimilarityHook()(nn.Identity(), (_x(2, 6),), _x(2, 5))
    hook = L2NormHook(1)
    hook.mask = PaddingMask(torch.ones(2, 9, dtype=torch.bool), 18)
    with pytest.raises(ImportanceError, match="padding mask"):
        hook(nn.Identity(), (_x(2, 5, 6),), None)


def test_keywords_only() -> None:
    hook, layer = L2NormHook(), nn.Identity()
    layer.register_forward_hook(hook, with_kwargs=True)
    layer(input=_x(3, 2, 6))
    torch.testing.assert_close(hook.accumulate(), _x(3, 2, 6).abs().mean(0).square().sum(0).sqrt())


def test_one_hook_on_two_modules() -> None:
    """Their sums would be one."""
    hook = L2NormHook()
    model = FlexModel(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), {})
    model.register_importance_hook("0", hook)
    with pytest.raises(ImportanceError, match="registered on 0 and cannot score 1"):
        model.register_importance_hook("1", hook)
    model.restore()
    model.register_importance_hook("0", hook)


def test_tokens_that_are_cut_in_another_way() -> None:
    """What a sum is over must stay: else some ranks' terms would be added that are none."""
    total, cut = ShardedSum(), DimLayout("dp", 2, Shard(0), Shard(0))
    own = LocalShard((3, 4), ActivationLayout((cut,)), ParallelMesh())
    total.add(torch.ones(4), LocalShard((3, 4), ActivationLayout(), ParallelMesh()), (0,))
    with pytest.raises(ImportanceError, match="cut over the mesh dims"):
        total.add(torch.ones(4), own, (0,))


def test_another_width_on_one_hook() -> None:
    hook = L2NormHook()
    _call(hook)
    before = hook.accumulate()
    with pytest.raises(ImportanceError, match="hook of its own"):
        _call(hook, _x(5, 2, 7))
    assert torch.equal(hook.accumulate(), before)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"activations_batches": []}, "must not be None or empty"),
        ({"activations_batches": None}, "must not be None or empty"),
        ({"prune_ratio": 1.1}, "from 0 to 1"),
        ({"prune_ratio": -0.1}, "from 0 to 1"),
        ({"importance_scores": torch.ones(5)}, "one score for each"),
        ({"importance_scores": torch.ones(7)}, "one score for each"),
        ({"importance_scores": torch.ones(6) * torch.nan}, "NaN"),
    ],
)
def test_evaluations_that_cannot_be(changed: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {
        "activations_batches": [_x(3, 6)],
        "importance_scores": torch.ones(6),
    }
    with pytest.raises(ImportanceError, match=says):
        evaluate_importance_scores(_linear(), **given | changed)


# -- files -------------------------------------------------------------------------------------


def _hooks() -> dict[str, ForwardHook]:
    hooks: dict[str, ForwardHook] = {"a": L2NormHook(), "b": _iterative(validation_full_iters=1)}
    for hook in hooks.values():
        _call(hook)
    return hooks


@pytest.mark.parametrize("file_format", ["safetensors", "pth"])
def test_states_come_back(tmp_path: Path, file_format: Any) -> None:
    """Lists, numbers and None as well as tensors."""
    hooks = _hooks() | {"c": L2NormHook()}
    save_states(hooks, tmp_path, file_format=file_format)
    for name, state in load_states(tmp_path).items():
        for key, value in hooks[name].state_dict().items():
            found = state[key]
            assert torch.equal(found, value) if isinstance(value, Tensor) else found == value


def test_stale_files_are_refused(tmp_path: Path) -> None:
    """Of ranks that this job has not, and of the other format: both would be read as well."""
    for stale in ("rank_7.safetensors", "rank_0.pth"):
        (tmp_path / stale).touch()
        with pytest.raises(ImportanceError, match=stale):
            dump_scores(_hooks(), tmp_path, {})
        assert [path.name for path in tmp_path.iterdir()] == [stale]
        (tmp_path / stale).unlink()


class _Own:
    """No class that a library has declared to be safe."""


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImportanceError, match="holds no rank_"):
        load_scores(tmp_path)
    (tmp_path / "rank_0.safetensors").write_bytes(b"no such file")
    with pytest.raises(ImportanceError, match="cannot be read"):
        load_scores(tmp_path)
    (tmp_path / "rank_0.safetensors").unlink()
    torch.save({"a": _Own()}, tmp_path / "rank_0.pth")  # runs code when unpickled
    with pytest.raises(ImportanceError, match="cannot be read"):
        load_scores(tmp_path)


def test_dumping_again_replaces(tmp_path: Path) -> None:
    hooks = _hooks()
    dump_scores(hooks, tmp_path, {"n": 1})
    _call(hooks["a"])
    dump_scores(hooks, tmp_path, {"n": 2})
    assert torch.equal(load_scores(tmp_path)["a"]["score"], hooks["a"].accumulate())
    assert json.loads((tmp_path / "args.json").read_text()) == {"n": 2}
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]


def _one_rank_cannot_write(folder: str) -> tuple[str, list[str]]:
    """On rank 1 a folder stands where its file is to be written."""
    target = Path(folder)
    if dist.get_rank() == 1:
        (target / ".rank_1.unfinished.safetensors").mkdir()
    dist.barrier()
    with pytest.raises(ImportanceError) as caught:
        dump_scores({"a": _hooks()["a"]}, folder, {})
    dist.barrier()
    return str(caught.value), sorted(path.name for path in target.glob("rank_*"))


def test_a_rank_that_cannot_write_fails_all(tmp_path: Path) -> None:
    """By name, on every rank, and no file has appeared."""
    for told, files in run_ranks(_one_rank_cannot_write, 2, str(tmp_path)):
        assert "rank 1" in told
        assert "writing failed" in told
        assert files == []
