"""Cutting a model in place, and (where asked) putting it back together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flex_model.layouts.names import module_at
from flex_model.pruning.configuration import pruned_config, skeleton
from flex_model.pruning.dimensions import Dimensions, Weight, read
from flex_model.pruning.plan import PruningPlan
from flex_model.pruning.rows import positions, selected
from flex_model.pruning.sharded import selected_shard

__all__ = ["cut", "pruned"]


def cut(model: nn.Module, plan: PruningPlan) -> None:
    """Prune a model in place. Collective where it is sharded.

    Weights that shrink are new parameters, one after the other; the model's modules stay, so hooks
    on them do too.
    """
    _Cutter(model, plan, None).run()


@contextmanager
def pruned(model: nn.Module, plan: PruningPlan) -> Iterator[None]:
    """The model pruned for as long as this is entered, and then as it was, to the same tensors."""
    with ExitStack() as undo:
        _Cutter(model, plan, undo).run()
        yield


class _Cutter:
    """Every change is that of a key in a dict, so that it can be taken back."""

    def __init__(self, model: nn.Module, plan: PruningPlan, undo: ExitStack | None) -> None:
        self._model = model
        self._plan = plan
        self._undo = undo

    def run(self) -> None:
        dimensions = read(self._model)
        config: Any = self._model.config
        before = skeleton(self._model, pruned_config(config, {}))
        after = skeleton(self._model, pruned_config(config, self._plan.fields))
        self._cut_weights(dimensions)
        if "layers" in self._plan.kept:
            for model in (before, self._model):
                self._drop_layers(module_at(model, dimensions.layers))
        self._renew_numbers(before, after)
        for field, value in self._plan.fields.items():
            self._set(vars(config), config.attribute_map.get(field, field), value)

    def _set(self, holder: MutableMapping[str, Any], key: str, value: Any) -> None:
        if self._undo is not None and key in holder:
            self._undo.callback(holder.__setitem__, key, holder[key])
        elif self._undo is not None:
            self._undo.callback(holder.pop, key)
        holder[key] = value

    def _cut_weights(self, dimensions: Dimensions) -> None:
        layers = self._plan.kept.get("layers")
        places = _places(self._model)
        for name, weight in dimensions.weights.items():
            if layers is not None and weight.layer is not None and weight.layer not in layers:
                continue
            shrunk = _shrunk(self._model.get_parameter(name), weight, self._plan.kept)
            for holder, own in places[name] if shrunk is not None else ():
                self._set(holder, own, shrunk)

    def _drop_layers(self, layers: nn.Module) -> None:
        kept = self._plan.kept["layers"].tolist()
        left = {str(new): layers._modules[str(old)] for new, old in enumerate(kept)}
        self._set(vars(layers), "_modules", left)

    def _renew_numbers(self, before: nn.Module, after: nn.Module) -> None:
        """Sizes, layer numbers and factors that modules keep, where the config decides them."""
        old, new = dict(before.named_modules()), dict(after.named_modules())
        for name, module in self._model.named_modules():
            if name not in new:
                continue
            for key, value in vars(new[name]).items():
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if number and vars(old[name]).get(key) != value:
                    self._set(vars(module), key, value)
                    self._renew_buffer(module, key, value)

    def _renew_buffer(self, module: nn.Module, key: str, value: float) -> None:
        """Gemma's factor of embeddings, which it keeps as a tensor too."""
        buffer = module._buffers.get(key.removeprefix("scalar_"))
        if buffer is not None:
            self._set(module._buffers, key.removeprefix("scalar_"), torch.full_like(buffer, value))


def _places(model: nn.Module) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """Where each parameter is held, by its first name: tied ones in several modules."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, list[tuple[dict[str, Any], str]]] = {name: [] for name in first.values()}
    for module in model.modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                found[first[id(parameter)]].append((module._parameters, own))
    return found


def _shrunk(
    parameter: nn.Parameter, weight: Weight, kept: Mapping[str, Tensor]
) -> nn.Parameter | None:
    """The parameter with what is kept of it; None where nothing is cut."""
    tensor: Tensor = parameter.detach()
    for dim, axis in enumerate(weight.axes):
        index = positions(axis, kept)
        if index is None:
            continue
        if isinstance(tensor, DTensor):
            tensor = selected_shard(tensor, dim, index)
        else:
            tensor = selected(tensor, dim, index)
    if tensor.shape == parameter.shape:
        return None
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)
