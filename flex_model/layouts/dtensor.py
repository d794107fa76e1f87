"""DTensors tell themselves; torch's wrappers tell the ranks they spread a model over."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement
from torch.nn.parallel import DistributedDataParallel

from flex_model.errors import LayoutError
from flex_model.layouts import fsdp
from flex_model.layouts.layout import block_count, is_sharded, shard_dim
from flex_model.layouts.names import named_parameters
from flex_model.layouts.sources import Site, Told

__all__ = ["as_dtensor", "groups", "parameter", "placements_by_name", "shard_sizes", "tell"]


def groups(root: nn.Module) -> Mapping[str, ProcessGroup]:
    """The meshes of DTensor parameters (one without names is tensor-parallel), and DDP's ranks."""
    found: dict[str, ProcessGroup] = {}
    for module in root.modules():
        if isinstance(module, DistributedDataParallel) and module.process_group.size() > 1:
            found["dp"] = module.process_group
    data_parallel = {_ranks(group) for group in fsdp.parameter_groups(root)}
    for _, parameter in named_parameters(root):
        tensor = as_dtensor(parameter)
        if isinstance(tensor, DTensor):
            for name, group in _groups_of(tensor).items():
                if _ranks(group) not in data_parallel:
                    found.setdefault(name, group)
    return found


def _groups_of(tensor: DTensor) -> dict[str, ProcessGroup]:
    """The groups of several ranks that a parameter lies over, by mesh dim."""
    mesh = tensor.device_mesh
    found: dict[str, ProcessGroup] = {}
    for axis in range(mesh.ndim):
        name = mesh.mesh_dim_names[axis] if mesh.mesh_dim_names else "tp"
        name = name if name in ("pp", "dp", "cp", "tp") else "tp"
        if mesh.size(axis) > 1 and (mesh.ndim > 1 or is_sharded(tensor.placements[axis])):
            found.setdefault(name, mesh.get_group(axis))
    return found


def as_dtensor(parameter: Tensor) -> Tensor:
    """The DTensor that a plain parameter stands for, if it is one.

    Before the first forward, DDP over tensor parallelism keeps a DTensor's shard as a plain
    parameter and the rest as a note on it (see torch.distributed.tensor.parallel.ddp).
    """
    spec = getattr(parameter, "_st_info", None)
    if spec is None:
        return parameter
    return DTensor.from_local(
        parameter.detach(),
        spec.mesh,
        spec.placements,
        run_check=False,
        shape=spec.shape,
        stride=spec.stride,
    )


def tell(site: Site) -> Told | None:
    """Nothing: after ``parallelize_module`` the layout sits in a hook's closure: it is traced."""
    return None


def parameter(root: nn.Module, name: str, tensor: Tensor) -> Placement | None:
    """A shard that DDP keeps of a DTensor; else nothing: DTensors are read as such."""
    spec = getattr(tensor, "_st_info", None)
    if spec is None and isinstance(tensor, DTensor) and not isinstance(tensor, nn.Parameter):
        spec = tensor._spec
    return spec.placements[0] if spec is not None and spec.mesh.ndim == 1 else None


def placements_by_name(
    tensor: DTensor, names: Mapping[tuple[int, ...], str]
) -> dict[str, Placement]:
    """A DTensor's placements by our mesh dims.

    Hybrid sharding lays parameters over parts of the data-parallel ranks, and with context
    parallelism over those ranks too; between forwards only, so these count as nothing.

    Args:
        tensor: any DTensor.
        names: mesh dim by the global ranks of this rank's group along it.

    Raises:
        LayoutError: the DTensor lies over ranks that are no dim of the job's mesh.
    """
    mesh = tensor.device_mesh
    found = {}
    for axis, placement in enumerate(tensor.placements):
        if mesh.size(axis) == 1:
            continue
        ranks = _ranks(mesh.get_group(axis))
        if ranks not in names:
            met = {name for group, name in names.items() if len({*ranks} & {*group}) > 1}
            if met and met <= {"dp", "cp"}:
                continue
            raise LayoutError(
                f"A DTensor of shape {tuple(tensor.shape)} lies over ranks {ranks}, which are no "
                f"dim of FlexModel's mesh {sorted(names.items())}. Give FlexModel "
                "the sizes, or the DeviceMesh, that the model was spread with."
            )
        found[names[ranks]] = placement
    return found


def shard_sizes(tensor: DTensor, placement: Placement, size: int) -> tuple[int, ...] | None:
    """Length of each rank's shard where torch cut a dim unevenly (it cuts like ``torch.chunk``)."""
    if not is_sharded(placement) or block_count(placement) > 1:
        return None
    whole = tensor.shape[shard_dim(placement)]
    if whole % size == 0:
        return None
    longest = -(-whole // size)
    return tuple(max(0, min(longest, whole - rank * longest)) for rank in range(size))


def _ranks(group: ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))
