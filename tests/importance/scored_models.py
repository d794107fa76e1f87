"""A model small enough to score in no time, whole and sharded, and what plain hooks make of it."""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from flex_model.importance import ForwardHook, Target, hooks_for
from flex_model.importance.run.targets import module_of

VOCABULARY, HIDDEN, INNER, LAYERS = 12, 6, 8, 3

TARGETS = (
    Target("layers.*.down", "iterative"),
    Target("layers.*.down", "l2"),
    Target("layers.*.down", "kv_heads"),
    Target("layers.*.up", "independent"),
    Target("layers.*.norm", "layer_norm"),
    Target("layers.*.norm", "hidden", {"per_token": True}),
    Target("layers.?", "layers"),
)


class Layer(nn.Module):
    """``x + down(act(up(norm(x))))``: every token by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Tiny(nn.Module):
    """Token ids, ``[batch, sequence]``, to logits."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            hidden_size=HIDDEN, num_attention_heads=4, num_key_value_heads=2, head_dim=INNER // 4
        )
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def whole(seed: int = 3, layers: int = LAYERS) -> Tiny:
    """The same values in every process."""
    model, generator = Tiny(layers), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def tensor_parallel() -> Tiny:
    """This rank's part of the same model."""
    model = whole()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    for layer in model.layers:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def token_batches(count: int = 7, size: int = 4, last: int = 2, seed: int = 5) -> list[Tensor]:
    """Token ids ``[size, 5]`` each, the last batch smaller."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size] * (count - 1) + [last]
    return [torch.randint(VOCABULARY, (rows, 5), generator=generator) for rows in sizes]


def plain_hooks(
    batches: Iterable[Any], targets: tuple[Target, ...] = TARGETS
) -> Mapping[str, ForwardHook]:
    """The truth: one process, a loop, and the hooks as torch's own forward hooks."""
    batches, model = list(batches), whole()
    hooks = hooks_for(model, targets, len(batches))
    for key, hook in hooks.items():
        model.get_submodule(module_of(key)).register_forward_hook(hook)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return hooks


def plain_scores(
    batches: Iterable[Any], targets: tuple[Target, ...] = TARGETS
) -> dict[str, dict[str, Tensor]]:
    """What `plain_hooks` found."""
    return {key: hook.to_dict() for key, hook in plain_hooks(batches, targets).items()}


Scores = Mapping[str, Mapping[str, Tensor]]


def assert_close(found: Scores, due: Scores) -> None:
    """Equal keys, and numbers to 1e-5 of the largest; ranks exactly."""
    assert found.keys() == due.keys()
    for key, named in due.items():
        assert found[key].keys() == named.keys(), key
        for name, values in named.items():
            scale = float(values.abs().max()) if values.is_floating_point() else 0.0
            torch.testing.assert_close(
                found[key][name],
                values,
                rtol=0,
                atol=1e-5 * scale,
                msg=lambda m, k=key: f"{k}: {m}",
            )


def assert_equal(found: Scores, due: Scores) -> None:
    """Equal to the bit."""
    assert found.keys() == due.keys()
    for key, named in due.items():
        for name, values in named.items():
            assert torch.equal(found[key][name], values), f"{key} {name}"
