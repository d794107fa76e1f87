"""What importance hooks read off a layer: its channels, its weight, and how its input lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from flex_model.core.local_shard import LocalShard
from flex_model.distributed.mesh import ParallelMesh
from flex_model.errors import ImportanceError
from flex_model.layouts.accelerate import offloaded
from flex_model.layouts.layout import ActivationLayout, DimLayout, is_sharded, shard_dim
from flex_model.layouts.resolve import groups_of, parameter_placement, tell
from flex_model.layouts.sources import Side, Site, loaded

__all__ = ["bias_added", "channels_of", "megatron_group", "plain_cut", "plain_shard"]
__all__ += ["PlainCut", "weight_of", "whole_channels"]


def channels_of(layer: nn.Module) -> int:
    """Input channels of a linear layer, over all ranks.

    Raises:
        ImportanceError: the layer is none.
    """
    for name in ("input_size", "in_features"):
        if isinstance(getattr(layer, name, None), int) and hasattr(layer, "weight"):
            return int(getattr(layer, name))
    raise ImportanceError(
        f"{type(layer).__name__} is no linear layer: it has neither in_features nor input_size "
        "beside its weight. Hook an nn.Linear or a RowParallelLinear, such as a down projection."
    )


def weight_of(layer: nn.Module, name: str = "weight") -> Tensor:
    """This rank's part of a layer's parameter, as the layer computes with it."""
    weight: Tensor = getattr(layer, name)
    if weight.is_meta:  # offloaded: accelerate brings it back for the forward only
        held = offloaded(layer, name)
        if held is None:
            raise ImportanceError(
                f"The {name} of {type(layer).__name__} is on the meta device and nothing tells "
                "where its values are. Load the model's weights first."
            )
        weight = held
    return (weight.to_local() if isinstance(weight, DTensor) else weight).detach()


def whole_channels(layer: nn.Module, own: int) -> None:
    """Refuse a weight whose rows are cut: what a channel contributes then lies on several ranks.

    Args:
        layer: a linear layer.
        own: channels of the input on this rank.

    Raises:
        ImportanceError: its weight is cut along the output.
    """
    weight = weight_of(layer)
    rows = getattr(layer, "output_size", getattr(layer, "out_features", weight.shape[0]))
    if weight.shape[0] != rows or weight.shape[1] != own:
        raise ImportanceError(
            f"{type(layer).__name__} has a weight {tuple(weight.shape)} on this rank, for {own} "
            f"input channels here and {rows} outputs in all. Hook a layer whose weight is cut "
            "along its input (row-parallel), such as a down or an output projection."
        )


def bias_added(layer: nn.Module, output: object) -> Tensor | None:
    """The bias if the layer's output holds it: Megatron's may be handed out beside the output."""
    if getattr(layer, "bias", None) is None:
        return None
    skipped = getattr(layer, "skip_bias_add", None)
    if skipped is None:
        skipped = isinstance(output, tuple) and len(output) > 1 and output[1] is not None
    return None if skipped else weight_of(layer, "bias")


def plain_shard(
    module: nn.Module, side: Side, tensor: Tensor, default: ProcessGroup | None = None
) -> LocalShard:
    """Which part a plain forward hook sees, as far as the module and the tensor themselves tell.

    That is how it lies over the tensor-parallel ranks; of data-parallel ones a plain hook knows
    nothing. Under FlexModel all are known.

    Args:
        module: the layer hooked.
        side: whether the tensor is its input or its output.
        tensor: ``[..., channels]`` on this rank.
        default: ranks over which channels are cut where nothing tells.
    """
    if isinstance(tensor, DTensor):
        return _of_dtensor(tensor)
    return plain_cut(module, side, tensor, default).of(tensor)


@dataclass(frozen=True)
class PlainCut:
    """How a layer's plain tensors lie over the tensor-parallel ranks.

    Attributes:
        layout: of them.
        mesh: those ranks.
    """

    layout: ActivationLayout
    mesh: ParallelMesh

    def of(self, tensor: Tensor) -> LocalShard:
        """The part of the whole that one of them is."""
        return LocalShard(tensor.shape, self.layout, self.mesh)


def plain_cut(
    module: nn.Module, side: Side, tensor: Tensor, default: ProcessGroup | None = None
) -> PlainCut:
    """See `plain_shard`; the same for all tensors of as many dims and channels."""
    group, placement = _told(module, side, tensor, default)
    if group is None or placement is None or not is_sharded(placement):
        return PlainCut(ActivationLayout(), ParallelMesh())
    dim = DimLayout("tp", group.size(), placement, placement)
    return PlainCut(ActivationLayout((dim,)), _mesh({"tp": group}))


def _told(
    module: nn.Module, side: Side, tensor: Tensor, default: ProcessGroup | None
) -> tuple[ProcessGroup | None, Placement | None]:
    group = groups_of(module).get("tp") if dist.is_initialized() else None
    if group is not None:
        told = tell(Site(module, "", module, side, 0, tensor.ndim))
        if told is not None:
            return group, told.value
        placement = _by_weight(module, side, tensor)
        if placement is not None:
            return group, placement
    if getattr(_weight(module), "sequence_parallel", False):
        return megatron_group(), Shard(0)  # a norm between Megatron's parallel regions
    if default is not None:
        return default, Shard(tensor.ndim - 1)
    return None, None


def megatron_group() -> ProcessGroup | None:
    """Megatron's tensor-parallel ranks, if there are several."""
    state = loaded("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return None
    group: ProcessGroup = state.get_tensor_model_parallel_group()
    return group if group.size() > 1 else None


def _by_weight(module: nn.Module, side: Side, tensor: Tensor) -> Placement | None:
    """A weight cut along its input has an input that is, unless the layer cuts it itself."""
    weight = _weight(module)
    if weight is None or side != "input":
        return None
    placement = parameter_placement(module, "weight", weight)
    if isinstance(weight, DTensor):
        placement = next((p for p in weight.placements if is_sharded(p)), Replicate())
    if placement is None or not is_sharded(placement) or shard_dim(placement) != 1:
        return Replicate()
    whole = weight.shape[1] if isinstance(weight, DTensor) else channels_of(module)
    return Replicate() if tensor.shape[-1] == whole else Shard(tensor.ndim - 1)


def _weight(module: nn.Module) -> Tensor | None:
    return getattr(module, "weight", None)


def _of_dtensor(tensor: DTensor) -> LocalShard:
    mesh = tensor.device_mesh
    dims, groups = [], {}
    for axis, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise ImportanceError(
                f"An activation {tuple(tensor.shape)} with placements {tensor.placements} holds "
                "terms of a sum. Register the hook by FlexModel, which adds them up."
            )
        if mesh.size(axis) > 1 and is_sharded(placement):
            name = (mesh.mesh_dim_names or ())[axis] if mesh.mesh_dim_names else f"dim {axis}"
            groups[name] = mesh.get_group(axis)
            sizes = _sizes(tensor, axis, shard_dim(placement), mesh)
            dims.append(DimLayout(name, mesh.size(axis), placement, placement, shard_sizes=sizes))
    local = tensor.to_local()
    return LocalShard(local.shape, ActivationLayout(tuple(dims)), _mesh(groups))


def _sizes(tensor: DTensor, axis: int, dim: int, mesh: DeviceMesh) -> tuple[int, ...] | None:
    """Lengths of the ranks' shards where they differ; chunks as torch cuts them."""
    length, ranks = tensor.shape[dim], mesh.size(axis)
    if length % ranks == 0:
        return None
    chunk = -(-length // ranks)
    return tuple(max(0, min(chunk, length - rank * chunk)) for rank in range(ranks))


def _mesh(groups: dict[str, ProcessGroup]) -> ParallelMesh:
    """The ranks of one layer: no more than its collectives need."""
    return ParallelMesh(names=tuple(groups), ranks=(), _groups=groups)
