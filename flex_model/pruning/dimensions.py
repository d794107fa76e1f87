"""Which weights share a dimension: the facts of transformers' decoder models.

Every weight is spelled dim by dim: ``q_proj.weight`` is "q hidden", ``gate_up_proj.weight``
"ffn+ffn hidden". Words of one kind stand for one space of indexes that are kept or cut together:
"q" and "kv" both belong to the KV heads of their layer, with so many rows for each head. A model is
understood where each of its weights is in the table and has the lengths that its config tells.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal

from torch import nn
from torch.distributed.tensor import DTensor

from flex_model.errors import PruningError
from flex_model.layouts.sources import loaded

__all__ = ["DIMENSIONS", "Axis", "Dimension", "Dimensions", "Part", "Space", "Weight", "head_dim"]
__all__ += ["read"]

Dimension = Literal["ffn", "kv_heads", "hidden", "layers", "experts"]
DIMENSIONS: tuple[Dimension, ...] = ("layers", "experts", "ffn", "kv_heads", "hidden")

# Decoder models of transformers 5.23 that are spelled by the table below.
_UNDERSTOOD = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"}
    | {"mixtral", "qwen2_moe", "qwen3_moe"}
)

# By the name below its layer, or below the model; "-" is a dim that nothing cuts.
_SPELLING = {
    "embed_tokens.weight": "- hidden",
    "lm_head.weight": "- hidden",
    "norm.weight": "hidden",
    "input_layernorm.weight": "hidden",
    "post_attention_layernorm.weight": "hidden",
    "pre_feedforward_layernorm.weight": "hidden",
    "post_feedforward_layernorm.weight": "hidden",
    "self_attn.q_proj.weight": "q hidden",
    "self_attn.q_proj.bias": "q",
    "self_attn.k_proj.weight": "kv hidden",
    "self_attn.k_proj.bias": "kv",
    "self_attn.v_proj.weight": "kv hidden",
    "self_attn.v_proj.bias": "kv",
    "self_attn.qkv_proj.weight": "q+kv+kv hidden",
    "self_attn.o_proj.weight": "hidden q",
    "self_attn.o_proj.bias": "hidden",
    "self_attn.q_norm.weight": "head",
    "self_attn.k_norm.weight": "head",
    "mlp.gate_proj.weight": "ffn hidden",
    "mlp.gate_proj.bias": "ffn",
    "mlp.up_proj.weight": "ffn hidden",
    "mlp.up_proj.bias": "ffn",
    "mlp.gate_up_proj.weight": "ffn+ffn hidden",
    "mlp.down_proj.weight": "hidden ffn",
    "mlp.down_proj.bias": "hidden",
    "mlp.gate.weight": "experts hidden",
    "mlp.experts.gate_up_proj": "experts expert_ffn+expert_ffn hidden",
    "mlp.experts.down_proj": "experts hidden expert_ffn",
    "mlp.shared_expert.gate_proj.weight": "shared_ffn hidden",
    "mlp.shared_expert.up_proj.weight": "shared_ffn hidden",
    "mlp.shared_expert.down_proj.weight": "hidden shared_ffn",
    "mlp.shared_expert_gate.weight": "- hidden",
}

_IN_LAYER = re.compile(r"(?P<list>(?:.+\.)?layers)\.(?P<number>\d+)\.(?P<own>.+)")


@dataclass(frozen=True)
class Space:
    """Indexes of which some are kept: the channels of one MLP, the KV heads of one layer, ...

    Attributes:
        name: the name that its scores go by.
        dimension: the dimension that it is of.
        field: the config's field with its size, which all spaces of that field share.
        size: how many indexes there are.
        rows: each of so many rows (experts) keeps indexes of its own; None where there is one row.
        layer: the number of its layer; None where the whole model shares it.
        aliases: other names that its scores may go by.
    """

    name: str
    dimension: Dimension
    field: str
    size: int
    rows: int | None = None
    layer: int | None = None
    aliases: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its scores."""
        return (self.size,) if self.rows is None else (self.rows, self.size)


@dataclass(frozen=True)
class Part:
    """A stretch of a tensor dim: ``unit`` entries for each index of a space, or ``unit`` in all."""

    unit: int
    space: Space | None = None

    def length(self, sizes: Mapping[str, int]) -> int:
        """Entries, where config fields have these sizes (those left out: as they are)."""
        if self.space is None:
            return self.unit
        return self.unit * sizes.get(self.space.field, self.space.size)


Axis = tuple[Part, ...]


@dataclass(frozen=True)
class Weight:
    """One parameter: what each of its dims consists of, and the layer that it is in (or None)."""

    axes: tuple[Axis, ...]
    layer: int | None

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Whole sizes, where config fields have these sizes."""
        return tuple(sum(part.length(sizes) for part in axis) for axis in self.axes)


@dataclass(frozen=True)
class Dimensions:
    """All that can be cut of a model.

    Attributes:
        spaces: by name.
        weights: by name, each tensor once: tied weights go by their first name.
        layers: the name of the list of layers.
    """

    spaces: Mapping[str, Space]
    weights: Mapping[str, Weight]
    layers: str

    def fields(self, dimension: Dimension) -> dict[str, int]:
        """The config's fields of a dimension, each with its size."""
        return {s.field: s.size for s in self.spaces.values() if s.dimension == dimension}

    def parameters(self, sizes: Mapping[str, int], layers: Collection[int]) -> int:
        """How many parameters the model has with these sizes, and these layers only."""
        return sum(
            prod(weight.shape(sizes))
            for weight in self.weights.values()
            if weight.layer is None or weight.layer in layers
        )


def read(model: nn.Module) -> Dimensions:
    """The dimensions of a transformers decoder model, whole or as its ``tp_plan`` shards it.

    Raises:
        PruningError: the architecture is not understood, naming the class or the first weight; or
            a weight has no values here.
    """
    reader = _Reader(_understood_config(model))
    weights: dict[str, Weight] = {}
    for name, parameter in model.named_parameters():
        weight = reader.weight(name, parameter.shape)
        if weight is None or weight.shape({}) != tuple(parameter.shape):
            raise _not_understood(model, f"{name} of shape {tuple(parameter.shape)}")
        weights[name] = weight
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.is_meta:
            raise PruningError(f"{name} has no values on this rank: load the model whole first.")
    lists = {found["list"] for found in map(_IN_LAYER.fullmatch, weights) if found}
    numbers = {weight.layer for weight in weights.values()} - {None}
    if len(lists) != 1 or numbers != set(range(reader.spaces["layers"].size)):
        raise _not_understood(model, f"layers {sorted(map(str, numbers))} in {sorted(lists)}")
    return Dimensions(reader.spaces, weights, lists.pop())


def head_dim(config: Any) -> int:
    """Features of one attention head."""
    told = getattr(config, "head_dim", None)
    return int(told or config.hidden_size // config.num_attention_heads)


def _understood_config(model: nn.Module) -> Any:
    library = loaded("transformers.modeling_utils")
    if library is None or not isinstance(model, library.PreTrainedModel):
        raise PruningError(
            f"Only transformers models can be pruned, got {type(model).__name__}. Give the model "
            "itself, below any wrapper (FlexModel.restore() returns it)."
        )
    config: Any = model.config
    if config.model_type not in _UNDERSTOOD or config.is_heterogeneous:
        raise _not_understood(model, f"model_type {config.model_type!r} in its config")
    if config.num_attention_heads % config.num_key_value_heads:
        raise PruningError(
            f"The heads do not divide: {config.num_attention_heads} query heads cannot be shared "
            f"out evenly over {config.num_key_value_heads} KV heads."
        )
    return config


def _not_understood(model: nn.Module, what: str) -> PruningError:
    return PruningError(
        f"The architecture of {type(model).__name__} is not understood: {what}. Understood are "
        f"the decoder models of the types {', '.join(sorted(_UNDERSTOOD))}."
    )


class _Reader:
    """Spells weights, and collects the spaces that they name."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self.spaces: dict[str, Space] = {}
        self._known(Space("layers", "layers", "num_hidden_layers", config.num_hidden_layers))

    def weight(self, name: str, shape: Sequence[int]) -> Weight | None:
        """The dims of a weight; None where the table does not have it."""
        found = _IN_LAYER.fullmatch(name)
        own = found["own"] if found else ".".join(name.split(".")[-2:])
        words = _SPELLING.get(own, "").split()
        if len(words) != len(shape):
            return None
        number = int(found["number"]) if found else None
        layer = f"{found['list']}.{number}" if found else ""
        return Weight(
            tuple(
                tuple(self._part(word, layer, number, length) for word in axis.split("+"))
                for axis, length in zip(words, shape, strict=True)
            ),
            number,
        )

    def _part(self, word: str, layer: str, number: int | None, length: int) -> Part:
        if word == "-":
            return Part(length)
        if word == "head":
            return Part(head_dim(self._config))
        if word == "q":
            shared = self._config.num_attention_heads // self._config.num_key_value_heads
            return Part(shared * head_dim(self._config), self._space("kv", layer, number))
        if word == "kv":
            return Part(head_dim(self._config), self._space("kv", layer, number))
        return Part(1, self._space(word, layer, number))

    def _space(self, word: str, layer: str, number: int | None) -> Space:
        size = partial(getattr, self._config)
        if word == "hidden":
            return self._known(Space("hidden", "hidden", "hidden_size", size("hidden_size")))
        if word == "kv":
            field, name = "num_key_value_heads", f"{layer}.self_attn.o_proj"
            return self._known(Space(name, "kv_heads", field, size(field), layer=number))
        if word == "experts":
            name, alias = f"{layer}.mlp.experts", (f"{layer}.mlp.gate",)
            experts = size("num_experts")
            return self._known(
                Space(name, "experts", "num_experts", experts, layer=number, aliases=alias)
            )
        field, below, rows = self._channels(word)
        name = f"{layer}.mlp.{below}down_proj"
        return self._known(Space(name, "ffn", field, size(field), rows, number))

    def _channels(self, word: str) -> tuple[str, str, int | None]:
        """Of an MLP: the config's field of its width, its name below "mlp", and its experts."""
        if word == "ffn":
            return "intermediate_size", "", None
        if word == "shared_ffn":
            return "shared_expert_intermediate_size", "shared_expert.", None
        own = hasattr(self._config, "moe_intermediate_size")
        field = "moe_intermediate_size" if own else "intermediate_size"
        return field, "experts.", self._config.num_experts

    def _known(self, space: Space) -> Space:
        return self.spaces.setdefault(space.name, space)
