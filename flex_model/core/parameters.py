"""A parameter made whole."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from flex_model.distributed.mesh import ParallelMesh
from flex_model.distributed.routing import assemble
from flex_model.errors import ConfigurationError
from flex_model.layouts.accelerate import offloaded
from flex_model.layouts.dtensor import as_dtensor
from flex_model.layouts.fsdp import cuts, unsharded
from flex_model.layouts.hints import Hint, apply_expected_shape
from flex_model.layouts.layout import ActivationLayout, DimLayout, replicated
from flex_model.layouts.names import module_at
from flex_model.layouts.resolve import parameter_placement

__all__ = ["unhookable", "whole_parameter"]


def whole_parameter(
    root: nn.Module, name: str, parameter: Tensor, mesh: ParallelMesh, expected_shape: Hint | None
) -> Tensor:
    """A detached CPU copy of a parameter: assembled from its shards, or fetched from where it is.

    Raises:
        ConfigurationError: the parameter has no values on this rank.
        HintError: a hint that does not fit.
    """
    with unsharded(root, name) as anew:
        if anew:  # other tensors stand in the module while its parameters are whole
            owner, _, own = name.rpartition(".")
            parameter = getattr(module_at(root, owner), own)
        held = as_dtensor(_with_values(root, name, parameter))
        if isinstance(held, DTensor):
            return held.full_tensor().detach().to("cpu", copy=True)
        layout = _layout_of(root, name, held, mesh, expected_shape)
        return assemble(held.detach(), layout, mesh).to("cpu", copy=True)


def unhookable(root: nn.Module, name: str, parameter: Tensor) -> str | None:
    """Why no hook on a parameter would ever see its gradient; None where one would."""
    if cuts(root, name, parameter):
        return "is cut by FSDP, which takes its gradient past hooks on the parameter"
    if parameter.is_meta:
        return "is offloaded: each forward fetches another tensor in its place"
    return None if parameter.requires_grad else "has requires_grad=False: it never gets a gradient"


def _with_values(root: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The parameter, or where it is on no device what its values are fetched from."""
    if not parameter.is_meta:
        return parameter
    values = offloaded(root, name)
    if values is None:
        raise ConfigurationError(
            f"Parameter {name} is on the meta device, and nothing tells where its values are. "
            "Load the model's weights first."
        )
    return values


def _layout_of(
    root: nn.Module, name: str, held: Tensor, mesh: ParallelMesh, expected_shape: Hint | None
) -> ActivationLayout:
    """How a plain tensor lies over the tensor-parallel ranks."""
    layout = ActivationLayout()
    if mesh.size("tp") > 1:
        placement = parameter_placement(root, name, held)
        if placement is None and expected_shape is None:
            placement = Replicate()
        layout = ActivationLayout((DimLayout("tp", mesh.size("tp"), placement, placement),))
    if expected_shape is None:
        return layout
    where = f"parameter {name}, rank {mesh.rank}"
    layout = apply_expected_shape(layout, tuple(held.shape), expected_shape, where)
    return _unknown_is_whole(layout)


def _unknown_is_whole(layout: ActivationLayout) -> ActivationLayout:
    return ActivationLayout(
        tuple(
            dim if dim.value is not None else replicated(dim.name, dim.size) for dim in layout.dims
        )
    )
