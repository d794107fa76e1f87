"""The config of the pruned model, and the proof that a model is built from it.

``from_pretrained`` builds a model from its config and fills it with the checkpoint's weights. The
same model, built without values, tells beforehand whether the weights will fit, and which numbers
its modules keep of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flex_model.errors import PruningError
from flex_model.pruning.dimensions import Dimensions, head_dim

__all__ = ["changed_fields", "check_weights", "pruned_config", "skeleton"]

# Fields that list something for each layer.
_BY_LAYER = ("layer_types",)


def changed_fields(config: Any, sizes: Mapping[str, int], layers: Sequence[int]) -> dict[str, Any]:
    """The config's fields that pruning changes, with their new values.

    Args:
        config: a transformers config.
        sizes: new sizes by field.
        layers: the layers that are kept.
    """
    fields: dict[str, Any] = {f: n for f, n in sizes.items() if n != getattr(config, f)}
    if "num_key_value_heads" in fields:
        shared = config.num_attention_heads // config.num_key_value_heads
        fields["num_attention_heads"] = shared * fields["num_key_value_heads"]
    if "num_hidden_layers" in fields:
        fields |= _by_layer(config, layers)
    told = getattr(config, "head_dim", None)
    if told is None and {"num_attention_heads", "hidden_size"} & set(fields):
        fields["head_dim"] = head_dim(config)  # else it would follow the others
    return fields


def _by_layer(config: Any, layers: Sequence[int]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name in _BY_LAYER:
        if getattr(config, name, None) is not None:
            fields[name] = [getattr(config, name)[layer] for layer in layers]
    if hasattr(config, "decoder_sparse_step"):  # every so many layers have experts
        fields["decoder_sparse_step"] = 1
        fields["mlp_only_layers"] = [
            new for new, old in enumerate(layers) if not _has_experts(config, old)
        ]
    return fields


def _has_experts(config: Any, layer: int) -> bool:
    step = config.decoder_sparse_step
    return layer not in (config.mlp_only_layers or ()) and (layer + 1) % step == 0


def pruned_config(config: Any, fields: Mapping[str, Any]) -> Any:
    """A config as it comes back from a checkpoint with these fields.

    Raises:
        PruningError: the architecture's own rules refuse it.
    """
    pruned = copy.deepcopy(config)
    vars(pruned).pop("distributed_config", None)
    for name, value in fields.items():
        setattr(pruned, name, value)
    try:
        return type(config).from_dict(pruned.to_dict())
    except Exception as error:
        raise PruningError(
            f"{type(config).__name__} does not allow {dict(fields)}. Choose other sizes. {error}"
        ) from error


def skeleton(model: nn.Module, config: Any) -> nn.Module:
    """The model of a config, without values."""
    with torch.device("meta"):
        return type(model)(config)


def check_weights(
    pruned: nn.Module, dimensions: Dimensions, sizes: Mapping[str, int], layers: Sequence[int]
) -> None:
    """That the pruned weights are those of the model built from the pruned config.

    Raises:
        PruningError: one of them is not.
    """
    due = {name: tuple(parameter.shape) for name, parameter in pruned.named_parameters()}
    number = {old: new for new, old in enumerate(layers)}
    found = {
        renumbered(name, dimensions.layers, weight.layer, number): weight.shape(sizes)
        for name, weight in dimensions.weights.items()
        if weight.layer is None or weight.layer in number
    }
    for name in sorted(due.keys() | found.keys()):
        if due.get(name) != found.get(name):
            raise PruningError(
                f"The architecture is not understood: pruned, {name} would be {found.get(name)}, "
                f"but a {type(pruned).__name__} of these sizes has {due.get(name)}."
            )


def renumbered(name: str, layers: str, layer: int | None, number: Mapping[int, int]) -> str:
    """A weight's name once layers are dropped."""
    if layer is None:
        return name
    before = f"{layers}.{layer}."
    return f"{layers}.{number[layer]}.{name.removeprefix(before)}"
