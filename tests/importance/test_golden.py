"""Numbers of the reference implementation, replayed: every value case, state by state."""

import copy
import json
import math
from typing import Any

import pytest
import torch
from golden_cases import (
    kv_kwargs,
    layer_of,
    named,
    tensors,
    with_values,
)
from torch import Tensor, nn

from flex_model.importance import (
    ForwardHook,
    IndependentChannelContributionHook,
    IndependentKvHeadContributionHook,
    IterativeChannelContributionHook,
    L2NormHook,
    LayerNormContributionHook,
    evaluate_importance_scores,
    load_scores,
    load_states,
)
from flex_model.importance.iterative import pruning_schedule

L2 = "L2NormHook"
INDEPENDENT = "IndependentChannelContributionHook"
ITERATIVE = "IterativeChannelContributionHook"
KV = "IndependentKvHeadContributionHook"
NORM = "LayerNormContributionHook"
EVALUATE = "evaluate_importance_scores"


def _make(case: dict[str, Any], layer: nn.Module | None) -> ForwardHook:
    kind = case["hook"]
    if kind == L2:
        return L2NormHook()
    assert layer is not None
    if kind == INDEPENDENT:
        return IndependentChannelContributionHook(layer)
    if kind == ITERATIVE:
        return IterativeChannelContributionHook(
            layer, case["constructor"]["activation_hooks_kwargs"]
        )
    if kind == KV:
        return IndependentKvHeadContributionHook(layer, kv_kwargs(case))
    return LayerNormContributionHook(layer, case["constructor"]["activation_hooks_kwargs"])


def _close(found: Tensor, due: Tensor, case: dict[str, Any], **changed: float) -> None:
    limits = {"rtol": case["rtol"], "atol": case["atol"], **changed}
    torch.testing.assert_close(
        found.double(), due.double(), equal_nan=True, check_dtype=False, **limits
    )


def _call(hook: ForwardHook, layer: nn.Module | None, case: dict[str, Any], given: Tensor,
          output: Any) -> None:  # fmt: skip
    args = (given, torch.full_like(given, 7.0)) if case.get("extra_positional_args") else (given,)
    hook(layer if layer is not None else nn.Identity(), args, output)


def _replay(case: dict[str, Any], state: str | None) -> ForwardHook:
    """Run a case, comparing its running state after each call, through a state dict if it asks."""
    values = tensors(case)
    layer = layer_of(case, values) if "layer" in case["constructor"] else None
    hook = _make(case, layer)
    outputs = case.get("outputs") or [None] * len(case["inputs"])
    for number, (key, output) in enumerate(zip(case["inputs"], outputs, strict=True)):
        given = values[key]
        output = values[output] if output is not None else layer(given) if layer else given
        _call(hook, layer, case, given, output)
        if state is not None:
            due = values[case["state_after_each_call"][number]]
            _close(hook.state_dict()[state], due, case)
        if case.get("resume_after_call") == number + 1:
            saved = hook.state_dict()
            hook = _make(case, layer)
            hook.load_state_dict(saved)
    return hook


def _check_end(hook: ForwardHook, case: dict[str, Any]) -> None:
    values, due = tensors(case), case["expected"]
    _close(hook.accumulate(), values[due["accumulate"]], case)
    found = hook.to_dict()
    assert sorted(found) == sorted(due["to_dict"])
    for name, key in due["to_dict"].items():
        _close(found[name], values[key], case)
    assert str(found["score"].dtype) == due["score_dtype"]
    assert not any(t.requires_grad for t in found.values())
    assert hook.get_progress_info() == due["progress"]
    if "state_dict_keys" in due:
        assert sorted(hook.state_dict()) == sorted(due["state_dict_keys"])


def _l2_cases() -> list[Any]:
    # The reference's own failure: an expert that no token chose makes its state NaN for good.
    return [case for case in with_values(L2) if case.id != "empty_expert_2d_nan"]


@pytest.mark.parametrize("case", _l2_cases())
def test_l2(case: dict[str, Any]) -> None:
    _check_end(_replay(case, "activations"), case)


def test_l2_of_an_idle_expert_stays_finite() -> None:
    """Catches a mean over no token; the call before it counts alone."""
    case = named(L2, "empty_expert_2d_nan")
    values = tensors(case)
    hook = L2NormHook()
    first, idle = (values[key] for key in case["inputs"])
    assert idle.shape[0] == 0
    hook(nn.Identity(), (first,), None)
    hook(nn.Identity(), (idle,), None)
    _close(hook.accumulate(), first.abs().mean(0), case)


def _independent_cases() -> list[Any]:
    # A 1-D input has no tokens: the reference averages over its channels.
    return [case for case in with_values(INDEPENDENT) if "1d" not in case.id]


@pytest.mark.parametrize("case", _independent_cases())
def test_independent(case: dict[str, Any]) -> None:
    _check_end(_replay(case, "agg_channel_activations"), case)


@pytest.mark.parametrize("case", with_values(KV))
def test_key_value_heads(case: dict[str, Any]) -> None:
    """bf16: computed in float32, as the reference class does on float32 copies."""
    if case["dtype"] == "fp32":
        _check_end(_replay(case, "agg_kv_head_contributions"), case)
        return
    hook, values = _replay(case, None), tensors(case)
    upcast = case["expected_if_upcast_to_fp32"]
    torch.testing.assert_close(hook.accumulate(), values[upcast["accumulate"]], rtol=1e-5, atol=0)
    _close(hook.accumulate(), values[case["expected"]["accumulate"]], case)


@pytest.mark.parametrize("case", with_values(NORM))
def test_layer_norm(case: dict[str, Any]) -> None:
    _check_end(_replay(case, "agg_embedding_activations"), case)


class _Watched(IterativeChannelContributionHook):
    """Keeps the contributions as they stand when channels are about to be pruned."""

    seen: Tensor | None = None

    def _prune(self, count: int) -> None:
        self.seen = self._whole()
        super()._prune(count)


def _iterative(case: dict[str, Any], layer: nn.Module) -> _Watched:
    return _Watched(layer, case["constructor"]["activation_hooks_kwargs"])


def _contributions(hook: _Watched) -> Tensor:
    found, hook.seen = hook.seen, None
    return found if found is not None else hook.state_dict()["agg_cont_per_channel"]


@pytest.mark.parametrize(
    "case", [c for c in with_values(ITERATIVE) if c.values[0]["dtype"] == "fp32"]
)
def test_iterative(case: dict[str, Any]) -> None:
    """Contributions, pruned channels and progress after each call, and the ranks exactly."""
    values = tensors(case)
    layer = layer_of(case, values)
    hook = _iterative(case, layer)
    assert hook.schedule == case["schedule"]
    bias = getattr(layer, "bias", None)
    beside = case["constructor"]["layer"]["kind"].startswith("megatron_like")
    for number, (given, output) in enumerate(zip(case["inputs"], case["outputs"], strict=True)):
        returned = (values[output], bias) if beside else values[output]
        hook(layer, (values[given],), returned)
        _close(_contributions(hook), values[case["agg_before_prune_each_call"][number]], case)
        assert hook.state_dict()["pruned_channels"] == case["pruned_after_each_call"][number]
        assert hook.get_progress_info() == case["progress_after_each_call"][number]
        if case["resume_after_call"] == number + 1:
            saved = hook.state_dict()
            hook = _iterative(case, layer)
            hook.load_state_dict(saved)
    due = case["expected"]
    found = hook.to_dict()
    for name, key in due["to_dict"].items():
        assert torch.equal(found[name], values[key]), name
    assert torch.equal(hook.accumulate(), values[due["accumulate"]])
    assert str(found["score"].dtype) == due["score_dtype"]
    assert sorted(hook.state_dict()) == sorted(due["state_dict_keys"])


@pytest.mark.parametrize(
    "case", [c for c in with_values(ITERATIVE) if c.values[0]["dtype"] == "bf16"]
)
def test_iterative_bf16_call_by_call(case: dict[str, Any]) -> None:
    """The reference computes in bfloat16 and has ties: it is followed call by call, to 3e-2."""
    values = tensors(case)
    layer = layer_of(case, values)
    hook, before, pruned_last = _iterative(case, layer), [], 0
    for number, (given, output) in enumerate(zip(case["inputs"], case["outputs"], strict=True)):
        if number:
            state = hook.state_dict()
            state["pruned_channels"] = before
            if pruned_last:
                state["agg_cont_per_channel"] = torch.zeros(hook.channels)
            hook = _iterative(case, layer)
            hook.load_state_dict(state)
        hook(layer, (values[given],), values[output])
        due = values[case["agg_before_prune_each_call"][number]]
        _close(_contributions(hook), due, case, rtol=3e-2)
        before, pruned_last = case["pruned_after_each_call"][number], case["schedule"][number]


@pytest.mark.parametrize(
    "case", [c for c in with_values(ITERATIVE) if c.values[0]["dtype"] == "bf16"]
)
def test_iterative_bf16_ranks_as_its_float32_copy(case: dict[str, Any]) -> None:
    """Catches arithmetic in the model's dtype: the reference on float32 copies is the truth."""
    values, due = tensors(case), case["expected_if_upcast_to_fp32"]
    layer = layer_of(case, values)
    hook = _iterative(case, layer)
    for given in case["inputs"]:
        hook(layer, (values[given],), layer.float()(values[given].float()).bfloat16())
        layer.bfloat16()
    ranks = values[due["accumulate"] if "accumulate" in due else due["to_dict"]["score"]]
    if due["min_relative_gap"] > 1e-4:
        assert torch.equal(hook.accumulate(), ranks)
    both = torch.stack((hook.accumulate().double(), ranks.double()))
    assert torch.corrcoef(both)[0, 1] > 0.99


def test_pruning_schedules() -> None:
    table = named(ITERATIVE, "pruning_schedule_table")["table"]
    assert len(table) >= 8
    for row in table:
        assert pruning_schedule(row["num_channels"], row["iters"]) == row["schedule"], row


@pytest.mark.parametrize("case", with_values(EVALUATE))
def test_evaluation(case: dict[str, Any]) -> None:
    values = tensors(case)
    layer = layer_of(case, values)
    ratio = case["constructor"]["prune_ratio"]
    given = {} if isinstance(ratio, str) else {"prune_ratio": ratio}
    batches = [values[key] for key in case["inputs"]]
    found = evaluate_importance_scores(layer, batches, values[case["importance_scores"]], **given)
    due = case["expected"]["metrics"]
    assert found["num_pruned"] == due["num_pruned"]
    for name in ("rmse", "cosine_similarity"):
        assert math.isclose(found[name], due[name], rel_tol=max(case["rtol"], 1e-5),
                            abs_tol=case["atol"]), name  # fmt: skip


# -- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["safetensors", "pth"])
def test_dump(file_format: Any, tmp_path: Any) -> None:
    """Names, keys and numbers of the reference's files; arguments are left as they were."""
    from omegaconf import OmegaConf

    case = named("disk", "ind_dump")
    values = tensors(case)
    layer = nn.Linear(6, values[case["weight"]].shape[0], bias=False)
    layer.weight.data.copy_(values[case["weight"]])
    hooks = {f"layers.{n}.mlp.down_proj": IndependentChannelContributionHook(layer)
             for n in range(2)}  # fmt: skip
    for key in case["inputs"]:
        for hook in hooks.values():
            hook(layer, (values[key],), layer(values[key]))
    args = OmegaConf.create(case["args_given"])
    before = copy.deepcopy(args)
    folder = tmp_path / "a" / "b"
    ForwardHook.dump_activations_logs(hooks, folder, args, file_format=file_format)
    ForwardHook.save_hook_states(hooks, folder, file_format=file_format)
    due = case["expected"]
    names = {path.name.replace(f".{file_format}", ".pth") for path in folder.iterdir()}
    assert names == {name.rpartition("/")[2] for name in due["files"]}
    assert args == before
    assert json.loads((folder / "args.json").read_text()) == due["args.json"]
    for file, loaded in (("rank_0.pth", load_scores(folder)),
                         ("hook_states_rank_0.pth", load_states(folder))):  # fmt: skip
        assert {m: sorted(named) for m, named in loaded.items()} == {
            m: sorted(named) for m, named in due[file].items()
        }
        for module, entries in due[file].items():
            for name, told in entries.items():
                assert list(loaded[module][name].shape) == told["tensor"]
                assert str(loaded[module][name].dtype) == told["dtype"]
    for module in hooks:
        torch.testing.assert_close(load_scores(folder)[module]["score"], values[due["score"]])


@pytest.mark.parametrize("name", ["ln_dump_full_args", "ln_dump_minimal_args"])
def test_dump_of_norms(name: str, tmp_path: Any) -> None:
    case = named("disk", name)
    values = tensors(named("disk", "ln_dump_full_args"))
    outputs = named("disk", "ln_dump_full_args")["outputs"]
    hooks = {}
    for module in range(3):
        norm = nn.LayerNorm(7)
        hook = LayerNormContributionHook(norm, {})
        for key in (key for key in outputs if key.endswith(f"module_{module}")):
            hook(norm, (values[key],), values[key])
        hooks[f"layers.{module}.input_layernorm"] = hook
    LayerNormContributionHook.dump_activations_logs(hooks, tmp_path, case["args_given"])
    found = json.loads((tmp_path / "channel_importance_results.json").read_text())
    due = case["expected"]["channel_importance_results.json"]
    assert sorted(found) == sorted(due)
    for key, value in due.items():
        if key in ("timestamp", "experiment_id") and "<" in str(value):
            continue
        if key == "channel_scores":
            torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(value))
        elif key == "score_statistics":
            for statistic, number in value.items():
                assert math.isclose(found[key][statistic], number, rel_tol=1e-5), statistic
        else:
            assert found[key] == value, key
