"""The sparsifier: torch.ao's contract, on models that run sharded or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flex_model.core.flex_model import FlexModel
from flex_model.core.hook_function import HookFunction
from flex_model.errors import SparsityError
from flex_model.layouts.names import named_modules
from flex_model.sparsity import files
from flex_model.sparsity.functions import FUNCTIONS, import_name
from flex_model.sparsity.layer import HookState, SparseLayer
from flex_model.sparsity.settings import checked, defaults_from, from_state, to_state

__all__ = ["ActivationSparsifier"]

_STATES: tuple[HookState, ...] = ("aggregate", "sparsify", "None")


class ActivationSparsifier:
    """Aggregates what layers are given, makes masks of it, and sparsifies their inputs by them.

    The contract is that of ``torch.ao.pruning.ActivationSparsifier``. Under FlexModel each rank
    works on its shard where the functions declare (`flex_model.elementwise` and its kin) that a
    shard suffices, on whole tensors otherwise; masks are whole and equal on every rank, and are
    applied as slices. Data-parallel ranks aggregate their own batches and are combined by `step`.
    Hooks are on as long as the sparsifier (or the FlexModel it was given) is kept.

    Args:
        model: a model, or the FlexModel around it.
        aggregate_fn: default ``(aggregate, input) -> aggregate``, of layers that get no other.
            Inputs are the layer's first tensor, detached, float64 or else float32.
        reduce_fn: default ``aggregate -> statistic``.
        mask_fn: default ``(statistic, **sparse_config) -> mask``.
        features: default indices along ``feature_dim`` that have a mask each.
        feature_dim: default dim of the features.
        combine_fn: keyword only. Default ``(aggregate, aggregate) -> aggregate`` of two
            data-parallel ranks; None adds them.
        zero_start: keyword only. Start aggregates from zeros, as torch does, in place of the first
            input; batches of other shapes are then left to ``aggregate_fn``.
        **sparse_config: default keywords of ``mask_fn``.

    Raises:
        SparsityError: the model runs as a pipeline.

    Examples:
        >>> sparsifier = ActivationSparsifier(model, torch.add, mean, above, threshold=0.5)
        >>> sparsifier.register_layer(model.down)
        >>> _ = model(x)  # as often as you like
        >>> sparsifier.step()
        >>> sparsifier.squash_mask()
    """

    def __init__(
        self,
        model: nn.Module,
        aggregate_fn: Callable[..., Tensor] | None = None,
        reduce_fn: Callable[..., Tensor] | None = None,
        mask_fn: Callable[..., Tensor] | None = None,
        features: Sequence[int] | None = None,
        feature_dim: int | None = None,
        *,
        combine_fn: Callable[..., Tensor] | None = None,
        zero_start: bool = False,
        **sparse_config: Any,
    ) -> None:
        self.zero_start = zero_start
        self.defaults: dict[str, Any] = {
            "aggregate_fn": aggregate_fn,
            "reduce_fn": reduce_fn,
            "mask_fn": mask_fn,
            "combine_fn": combine_fn,
            "features": features,
            "feature_dim": feature_dim,
            "sparse_config": sparse_config,
        }
        self._layers: dict[str, SparseLayer] = {}
        self._flex: FlexModel | None = None
        self.attach(model)

    # -- layers --------------------------------------------------------------------------------

    def register_layer(
        self,
        layer: nn.Module | str,
        aggregate_fn: Callable[..., Tensor] | None = None,
        reduce_fn: Callable[..., Tensor] | None = None,
        mask_fn: Callable[..., Tensor] | None = None,
        features: Sequence[int] | None = None,
        feature_dim: int | None = None,
        *,
        combine_fn: Callable[..., Tensor] | None = None,
        **sparse_config: Any,
    ) -> None:
        """Look after a layer, given as a module or by its name. Every rank does so alike.

        What is not given is taken from the defaults. A layer that is looked after already is begun
        anew.

        Raises:
            SparsityError: the model has no such layer, or something is missing.
        """
        name = self._name_of(layer)
        given = {
            "aggregate_fn": aggregate_fn,
            "reduce_fn": reduce_fn,
            "mask_fn": mask_fn,
            "combine_fn": combine_fn,
            "features": features,
            "feature_dim": feature_dim,
        }
        asked = self.defaults | {key: value for key, value in given.items() if value is not None}
        asked["sparse_config"] = {**self.defaults["sparse_config"], **sparse_config}
        self._add(SparseLayer(name, checked(name, asked), self.zero_start), "aggregate")

    def unregister_layer(self, name: str) -> None:
        """Leave a layer alone again, and forget its mask.

        Raises:
            SparsityError: it is not registered.
        """
        self._hook(self._layer(name), "None")
        del self._layers[name]

    def _add(self, layer: SparseLayer, hook_state: HookState) -> None:
        if layer.name in self._layers:
            self.unregister_layer(layer.name)
        self._hook(layer, hook_state)
        self._layers[layer.name] = layer

    def _hook(self, layer: SparseLayer, hook_state: HookState) -> None:
        """Change what a layer's hook does."""
        if layer.hook is not None and self._flex is not None and self._flex.has_hook(layer.hook):
            self._flex.remove_hook(layer.hook)
        layer.hook = None
        if hook_state != "None" and self._flex is not None:
            aggregates = hook_state == "aggregate"
            layer.hook = layer.aggregating() if aggregates else layer.sparsifying()
            self._flex.register_forward_pre_hook(layer.hook)
        layer.hook_state = hook_state

    # -- masks ---------------------------------------------------------------------------------

    def step(self) -> None:
        """Make every layer's mask of what was aggregated, and begin new aggregates. Collective.

        A layer that no input has reached keeps the mask it has.

        Raises:
            SparsityError: nothing was aggregated, or a mask cannot be made; then nothing changes.
        """
        made = {layer: layer.new_masks() for layer in self._layers.values()}
        if not any(masks is not None for masks in made.values()):
            raise SparsityError(
                "step() makes masks of what layers were given, and none was given anything since "
                f"the last one (registered: {[*self._layers]}). Run the model first."
            )
        for layer, masks in made.items():
            if masks is not None:
                layer.masks = masks
                layer.forget()

    def get_mask(
        self, name: str | None = None, layer: nn.Module | None = None
    ) -> Tensor | list[Tensor]:
        """A layer's whole mask, or a list of one for each feature.

        Raises:
            SparsityError: it is not registered, or has no mask yet.
        """
        if name is None:
            if layer is None:
                raise SparsityError("get_mask() needs the name of a layer, or the layer.")
            name = self._name_of(layer)
        mask = self._layer(name).mask
        if mask is None:
            raise SparsityError(f"Layer {name} has no mask yet. Run the model and step().")
        return mask

    def squash_mask(self, attach_sparsify_hook: bool = True) -> None:
        """End aggregating, and sparsify every layer's input from now on if asked.

        Raises:
            SparsityError: a layer has no mask; then nothing changes.
        """
        without = [name for name, layer in self._layers.items() if layer.masks is None]
        if attach_sparsify_hook and without:
            raise SparsityError(
                f"Layers {without} have no mask to sparsify by. Run the model and step(), or "
                "unregister those that no input reaches."
            )
        for layer in self._layers.values():
            layer.forget()
            self._hook(layer, "sparsify" if attach_sparsify_hook else "None")

    # -- state ---------------------------------------------------------------------------------

    @property
    def state(self) -> dict[str, dict[str, Tensor | list[Tensor] | None]]:
        """Every layer's mask."""
        return {name: {"mask": layer.mask} for name, layer in self._layers.items()}

    @property
    def hooks(self) -> list[HookFunction]:
        """The hook functions that are on now."""
        return [layer.hook for layer in self._layers.values() if layer.hook is not None]

    @property
    def data_groups(self) -> dict[str, dict[str, Any]]:
        """Every layer's configuration, functions, aggregate, module and hook, to look at."""
        found: dict[str, dict[str, Any]] = {}
        for name, layer in self._layers.items():
            own, functions = layer.settings, layer.settings.functions
            found[name] = {
                "aggregate_fn": functions.aggregate,
                "reduce_fn": functions.reduce,
                "mask_fn": functions.mask,
                "combine_fn": functions.combine,
                "features": list(own.features) if own.features is not None else None,
                "feature_dim": own.feature_dim,
                "sparse_config": dict(own.sparse_config),
                "layer": self._modules().get(name),
                "hook": layer.hook,
                "hook_state": layer.hook_state,
            }
            if layer.data is not None:
                found[name]["data"] = layer.data
        return found

    def state_dict(self) -> dict[str, Any]:
        """``state`` (masks), ``data_groups`` and ``defaults``; functions by their import names.

        The same on every rank. What is aggregated but not made a mask of yet is not in it.

        Raises:
            SparsityError: a function has no name to be found by.
        """
        groups = {
            name: {**to_state(layer.settings), "hook_state": layer.hook_state}
            for name, layer in self._layers.items()
        }
        functions = {key: import_name(self.defaults[key]) for key in FUNCTIONS}
        defaults = {**self.defaults, **functions, "zero_start": self.zero_start}
        defaults["sparse_config"] = dict(defaults["sparse_config"])
        masks = {name: {"mask": _copy(held["mask"])} for name, held in self.state.items()}
        return {"state": masks, "data_groups": groups, "defaults": defaults}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a state in place of what there is. Every rank does so alike.

        Raises:
            SparsityError: it is of other layers or incomplete; then nothing changes.
        """
        layers, states, defaults = self._read(state_dict)
        if self._flex is not None:
            unknown = [name for name in layers if name not in self._modules()]
            if unknown:
                raise SparsityError(
                    f"The state is of layers {unknown}, which this model has not. It is another "
                    "model's; nothing was changed."
                )
        for name in [*self._layers]:
            self.unregister_layer(name)
        self.zero_start = bool(defaults.pop("zero_start"))
        self.defaults = defaults
        for name, layer in layers.items():
            self._add(layer, states[name])

    def save(self, folder: str | Path) -> None:
        """Write the state: ``sparsifier.safetensors`` and ``sparsifier.json``, from rank 0."""
        files.write(Path(folder), self.state_dict())

    def load(self, folder: str | Path) -> None:
        """Take up what `save` wrote. See `load_state_dict`."""
        self.load_state_dict(files.read(Path(folder)))

    def _read(
        self, state: Mapping[str, Any]
    ) -> tuple[dict[str, SparseLayer], dict[str, HookState], dict[str, Any]]:
        """A state's layers, what their hooks do, and the defaults; nothing is changed."""
        try:
            masks, groups, told = state["state"], state["data_groups"], state["defaults"]
            zero_start = bool(told["zero_start"])
            states: dict[str, HookState] = {n: g["hook_state"] for n, g in groups.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise SparsityError(f"This is no sparsifier's state: {error} is missing.") from error
        wrong = [name for name, found in states.items() if found not in _STATES]
        if wrong or {*masks} != {*groups}:
            raise SparsityError(
                f"A state must tell of the same layers in state {sorted(masks)} and data_groups "
                f"{sorted(groups)}, each with a hook_state out of {_STATES}."
            )
        layers = {}
        for name, group in groups.items():
            layer = layers[name] = SparseLayer(name, from_state(name, group), zero_start)
            layer.masks = _checked_masks(layer, masks[name].get("mask"), states[name])
        return layers, states, {**defaults_from(told), "zero_start": zero_start}

    # -- the model -----------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module | None:
        """The model looked after; None after unpickling, until `attach`."""
        return self._flex.module if self._flex is not None else None

    def attach(self, model: nn.Module) -> None:
        """Look after a model, as is needed after unpickling: hooks and ranks are a job's own.

        Raises:
            SparsityError: the model lacks a layer, runs as a pipeline, or there is one already.
        """
        if self._flex is not None:
            raise SparsityError("This sparsifier looks after a model already. Make another one.")
        flex = model if isinstance(model, FlexModel) else FlexModel(model, {})
        if flex.parallel_mesh.size("pp") > 1:
            raise SparsityError(
                "A model that runs as a pipeline cannot be sparsified: its stages hold different "
                "layers, and masks are to be equal on all ranks."
            )
        unknown = [name for name in self._layers if name not in dict(named_modules(flex.module))]
        if unknown:
            raise SparsityError(f"The model has no layers {unknown}, which have masks here.")
        self._flex = flex
        for layer in self._layers.values():
            self._hook(layer, layer.hook_state)

    def _modules(self) -> dict[str, nn.Module]:
        return dict(named_modules(self._flex.module)) if self._flex is not None else {}

    def _name_of(self, layer: nn.Module | str) -> str:
        modules = self._modules()
        if isinstance(layer, str) and layer in modules:
            return layer
        for name, module in modules.items():
            if module is layer:
                return name
        what = repr(layer) if isinstance(layer, str) else f"this {type(layer).__name__}"
        raise SparsityError(f"The model has no layer {what}.")

    def _layer(self, name: str) -> SparseLayer:
        if name not in self._layers:
            raise SparsityError(f"Layer {name!r} is not registered; {[*self._layers]} are.")
        return self._layers[name]

    def __getstate__(self) -> dict[str, Any]:
        return self.state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._flex, self._layers = None, {}
        self.load_state_dict(state)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        hidden = {"data", "hook", *FUNCTIONS}
        for name, group in self.data_groups.items():
            lines += ["\tData Group", f"\t    name: {name}"]
            lines += [f"\t    {key}: {group[key]}" for key in sorted(group) if key not in hidden]
        return "\n".join(lines) + ")"


def _copy(mask: Tensor | list[Tensor] | None) -> Tensor | list[Tensor] | None:
    if isinstance(mask, list):
        return [one.clone() for one in mask]
    return mask.clone() if mask is not None else None


def _checked_masks(layer: SparseLayer, mask: Any, hook_state: HookState) -> list[Tensor] | None:
    masks = mask if isinstance(mask, list) or mask is None else [mask]
    if masks is None:
        if hook_state == "sparsify":
            raise SparsityError(f"The state of layer {layer.name} sparsifies by no mask.")
        return None
    due = len(layer.settings.features) if layer.settings.features is not None else 1
    if len(masks) != due or not all(isinstance(one, Tensor) for one in masks):
        raise SparsityError(f"The state of layer {layer.name} must hold {due} masks.")
    return [one.detach().clone() for one in masks]
