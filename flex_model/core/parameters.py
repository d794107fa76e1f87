"""A parameter made whole."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from flex_model.distributed.mesh import ParallelMesh
from flex_model.distributed.routing import assemble
from flex_model.layouts.hints import Hint, apply_expected_shape
from flex_model.layouts.layout import ActivationLayout, DimLayout, replicated
from flex_model.layouts.resolve import parameter_placement

__all__ = ["whole_parameter"]


def whole_parameter(
    root: nn.Module, name: str, parameter: Tensor, mesh: ParallelMesh, expected_shape: Hint | None
) -> Tensor:
    """A detached CPU copy of a parameter, assembled over its tensor-parallel shards."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach().to("cpu", copy=True)
    local = parameter.detach()
    if mesh.size("tp") == 1:
        layout = ActivationLayout()
    else:
        placement = parameter_placement(root, name, parameter)
        if placement is None and expected_shape is None:
            placement = Replicate()
        layout = ActivationLayout((DimLayout("tp", mesh.size("tp"), placement, placement),))
    if expected_shape is not None:
        where = f"parameter {name}, rank {mesh.rank}"
        layout = apply_expected_shape(layout, tuple(local.shape), expected_shape, where)
        layout = _unknown_is_whole(layout)
    return assemble(local, layout, mesh).to("cpu", copy=True)


def _unknown_is_whole(layout: ActivationLayout) -> ActivationLayout:
    return ActivationLayout(
        tuple(
            dim if dim.value is not None else replicated(dim.name, dim.size) for dim in layout.dims
        )
    )
