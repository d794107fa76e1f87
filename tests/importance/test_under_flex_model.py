"""Importance hooks under FlexModel: scores of one process's whole batch, however it is sharded."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from flex_model import FlexModel, HookFunction, observes
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
)
from flex_model.testing.case import Case, Model
from flex_model.testing.ranks import run_ranks
from flex_model.testing.step import take_step
from frameworks.rows import row

STEPS = 2
HEADS, HEAD_DIM = 4, 8


def _names(module: nn.Module) -> dict[str, str]:
    """The second layer's down and output projections, a norm, and the layer itself."""
    names = {name for name, _ in module.named_modules()}
    for layer, down, out, norm in (
        ("decoder.layers.1", "mlp.linear_fc2", "self_attention.linear_proj", "input_layernorm"),
        ("model.layers.1", "mlp.down_proj", "self_attn.o_proj", "input_layernorm"),
        ("layers.1", "feed_forward.w2", "attention.wo", "attention_norm"),
    ):
        plain = {name.replace("_fsdp_wrapped_module.", "").replace("module.", "", 1)
                 for name in names} | names  # fmt: skip
        if f"{layer}.{down}" in plain:
            return {"layer": layer, "down": f"{layer}.{down}", "out": f"{layer}.{out}",
                    "norm": f"{layer}.{norm}"}  # fmt: skip
    raise AssertionError(sorted(names))


def _hooks(get: Any, names: dict[str, str], sequence_dim: int) -> dict[str, list[ForwardHook]]:
    """Several kinds of hooks on one model; ``get`` finds a module."""
    down, out, norm = (get(names[key]) for key in ("down", "out", "norm"))
    config = SimpleNamespace(num_attention_heads=HEADS, hidden_size=24, head_dim=HEAD_DIM)
    kwargs = {
        "model": SimpleNamespace(config=config),
        "block_config": SimpleNamespace(attention=SimpleNamespace(num_key_value_heads=2)),
    }
    iterative = {"validation_full_iters": STEPS}
    scaled = {**iterative, "calibration_method": "scale_by_magnitude"}
    return {
        names["down"]: [
            L2NormHook(sequence_dim),
            L2NormHook(sequence_dim, per_token=True),
            IndependentChannelContributionHook(down),
            IterativeChannelContributionHook(down, iterative),
            IterativeChannelContributionHook(down, scaled),
        ],
        names["out"]: [
            IndependentKvHeadContributionHook(out, kwargs),
            AttentionHeadHook(out, Heads.of(config, 2), sequence_dim),
        ],
        names["norm"]: [
            LayerNormContributionHook(norm, {}),
            L2NormHook(sequence_dim, side="output"),
        ],
        names["layer"]: [LayerSimilarityHook(sequence_dim)],
    }


def _scores(hooks: dict[str, list[ForwardHook]]) -> dict[str, dict[str, Tensor]]:
    return {
        f"{name} {number} {type(hook).__name__}": hook.to_dict()
        for name, several in hooks.items()
        for number, hook in enumerate(several)
    }


def _sequence_dim(name: str) -> int:
    return 0 if name.startswith("megatron") else 1


def _on_one_process(name: str) -> dict[str, dict[str, Tensor]]:
    case: Case = row(name)
    with case.whole() as model:
        module = model.module
        hooks = _hooks(module.get_submodule, _names(module), _sequence_dim(name))
        for path, several in hooks.items():
            for hook in several:
                module.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
        for _ in range(STEPS):
            take_step(case, model, module, replicas=1)
        return _scores(hooks)


def _sharded(name: str) -> dict[str, dict[str, Tensor]]:
    case: Case = row(name)
    with case.sharded() as model, _wrapped(case, model) as hooked:
        names = _names(model.module)
        modules = {**dict(hooked.module.named_modules()), **_plain(hooked.module)}
        hooks = _hooks(modules.__getitem__, names, _sequence_dim(name))
        for path, several in hooks.items():
            for hook in several:
                hooked.register_importance_hook(path, hook)
        if model.parallelize is not None:
            model.parallelize()
        for _ in range(STEPS):
            around = hooked.step() if model.schedule is not None else nullcontext()
            take_step(case, model, hooked, case.dp, around)
        return _scores(hooks)


def _plain(module: nn.Module) -> dict[str, nn.Module]:
    from flex_model.layouts.names import named_modules

    return dict(named_modules(module))


def _wrapped(case: Case, model: Model) -> FlexModel:
    return FlexModel(
        model.module, {}, tensor_parallel_size=case.tp, data_parallel_size=case.dp,
        context_parallel_size=case.cp,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "megatron",
        "megatron sequence",
        "megatron tp x dp",
        "fairscale tp x dp",
        "dtensor sequence",
        "transformers",
        "transformers tp x fsdp",
        "fsdp1",
        "fsdp2",
        "fsdp2 x tp",
        "ddp x tp",
        "accelerate device map",
        "context x dp",
    ],
)
def test_scores_equal_one_process(name: str) -> None:
    """Every kind of hook in one pass, forward and backward; row-parallel sums reorder: 1e-5."""
    (due,) = run_ranks(_on_one_process, 1, name)
    for rank, found in enumerate(run_ranks(_sharded, row(name).world_size, name)):
        assert list(found) == list(due)
        for hook, scores in due.items():
            for key, value in scores.items():
                error = (found[hook][key].double() - value.double()).abs()
                largest = value.double().abs().max()
                assert error.max() <= 1e-5 * largest, f"{hook} {key} on rank {rank}: {error}"


# -- what one model shows ----------------------------------------------------------------------


class Mlp(nn.Module):
    """``[batch, tokens, 6]`` through 8 channels; recomputed in backward if asked."""

    def __init__(self, recomputed: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.recomputed = recomputed
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def _inner(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if not self.recomputed:
            return self._inner(x)
        found: Tensor = checkpoint(self._inner, x, use_reentrant=False)  # type: ignore[assignment]
        return found


def _inputs(seed: int = 4, batch: int = 4) -> Tensor:
    return torch.randn(batch, 5, 6, generator=torch.Generator().manual_seed(seed))


def _plain_scores(x: Tensor, make: Any) -> Tensor:
    model = Mlp()
    hook: ForwardHook = make(model.down)
    model.down.register_forward_hook(hook)
    with torch.no_grad():
        model(x)
    return hook.accumulate()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_recompute_is_not_counted_twice(wrapped: bool) -> None:
    """Activation checkpointing runs the layer again within backward."""
    due = _plain_scores(_inputs(), IndependentChannelContributionHook)
    model = Mlp(recomputed=True)
    hook = IndependentChannelContributionHook(model.down)
    called: Any = model
    if wrapped:
        called = FlexModel(model, {})
        called.register_importance_hook("down", hook)
    else:
        model.down.register_forward_hook(hook)
    called(_inputs().requires_grad_()).sum().backward()
    assert torch.equal(hook.accumulate(), due)
    assert not hook.accumulate().requires_grad


def _make_all(layer: nn.Module) -> list[ForwardHook]:
    return [
        L2NormHook(1),
        IndependentChannelContributionHook(layer),
        IterativeChannelContributionHook(layer, {"validation_full_iters": 1}),
    ]


def test_autocast_changes_no_statistic() -> None:
    """The activations are bfloat16, what is made of them is not."""
    model = Mlp()
    seen: list[Tensor] = []
    model.down.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    hooks = _make_all(model.down)
    for hook in hooks:
        model.down.register_forward_hook(hook)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(_inputs())
    exact = seen[0].float()
    for hook, alone in zip(hooks, _make_all(model.down), strict=True):
        alone(model.down, (exact,), None)
        torch.testing.assert_close(hook.accumulate(), alone.accumulate(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("sequence_first", [False, True])
def test_padding_does_not_count(kind: int, sequence_first: bool) -> None:
    """As if the padded tokens were not there: two samples of 5 and 2 tokens."""
    x, lengths = _inputs(batch=2), (5, 2)
    own = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    model = Mlp()
    inner = torch.relu(model.up(x)).detach()
    hook = _make_all(model.down)[kind]
    hook.sequence_dim = 0 if sequence_first else 1
    hook.mask = PaddingMask(own, int(own.sum()))
    hook(model.down, (inner.transpose(0, 1) if sequence_first else inner,), None)
    if kind == 0:
        means = torch.stack([inner[b, :n].abs().mean(0) for b, n in enumerate(lengths)])
        due = means.square().sum(0).sqrt()
    else:
        alone = _make_all(model.down)[kind]
        alone(model.down, (torch.cat([inner[b, :n] for b, n in enumerate(lengths)]),), None)
        due = alone.accumulate()
    torch.testing.assert_close(hook.accumulate(), due)


def _masked(dp: int, tp: int) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    place = mesh.get_local_rank("dp")
    model = Mlp()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    mask = _mask()
    hooks = _make_all(model.down)
    with FlexModel(model, {}, mesh=mesh) as hooked, torch.no_grad():
        for hook in hooks:
            hook.mask = PaddingMask(mask.chunk(dp)[place], int(mask.sum()))
            hooked.register_importance_hook("down", hook)
        hooked(_inputs().chunk(dp)[place])
        return [hook.accumulate() for hook in hooks]


def _mask() -> Tensor:
    return torch.arange(5) < torch.tensor([5, 2, 4, 1]).unsqueeze(1)


def test_padding_on_several_ranks() -> None:
    """Each data-parallel rank pads its own samples; the mean is over all real tokens."""
    model = Mlp()
    due = []
    for hook in _make_all(model.down):
        hook.mask = PaddingMask(_mask(), int(_mask().sum()))
        model.down.register_forward_hook(hook)
        due.append(hook)
    with torch.no_grad():
        model(_inputs())
    for found in run_ranks(_masked, 4, 2, 2):
        for scores, hook in zip(found, due, strict=True):
            torch.testing.assert_close(scores.double(), hook.accumulate().double())


def test_scores_follow_groups_and_restore() -> None:
    """Catches hooks that run on when their group is off, or after the model was restored."""
    model = Mlp()
    hook = IndependentChannelContributionHook(model.down)
    hooked = FlexModel(model, {})
    hooked.register_importance_hook("down", hook)
    with torch.no_grad():
        hooked(_inputs())
        once = hook.accumulate()
        with hooked.hook_groups([]):
            hooked(_inputs())
        hooked.restore()(_inputs())
    assert torch.equal(hook.accumulate(), once)


def test_an_observer_sees_each_forward_once() -> None:
    """Detached, before the edit, and what it returns is dropped."""
    seen: list[tuple[Tensor, tuple[int, ...]]] = []

    @observes
    def look(module: Any, inputs: Tensor, save_ctx: Any, modules: Any, *, shard: Any) -> Any:
        seen.append((inputs, tuple(shard.whole_shape)))
        return "dropped"

    model = Mlp()
    activations: dict[str, list[Tensor]] = {}
    with FlexModel(model, activations, debug=True) as hooked:
        hooked.register_forward_hook(HookFunction("up", editing_function=look))
        out = hooked(_inputs())
    ((inputs, shape),) = seen
    assert shape == (4, 5, 8)
    assert not inputs.requires_grad
    assert torch.equal(inputs, model.up(_inputs()))
    assert torch.equal(out, model(_inputs()))
    assert not activations
