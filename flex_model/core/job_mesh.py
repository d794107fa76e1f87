"""Which ranks hold the model, and along which mesh dims: from sizes, a mesh, or its framework."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from flex_model.distributed.mesh import ParallelMesh, build_mesh, device_type_of, from_device_mesh
from flex_model.errors import ConfigurationError
from flex_model.layouts.resolve import groups_of

__all__ = ["job_mesh"]


def job_mesh(
    module: nn.Module,
    sizes: dict[str, int],
    process_group: ProcessGroup | None,
    mesh: DeviceMesh | None,
) -> ParallelMesh:
    """The mesh of a job: as given, or as the model and its framework tell and the sizes fill in.

    Args:
        module: the model on this rank.
        sizes: ranks along "pp", "dp", "cp" and "tp".
        process_group: the ranks that hold the model; None for all.
        mesh: in place of both.

    Raises:
        ConfigurationError: they contradict each other, the job or the model.
    """
    if mesh is not None:
        if any(size != 1 for size in sizes.values()) or process_group is not None:
            raise ConfigurationError("Give either a mesh, or sizes and a process_group, not both.")
        return _checked_against_model(from_device_mesh(mesh), module)
    adopted = groups_of(module) if dist.is_available() and dist.is_initialized() else {}
    fully_sharded = adopted["dp"].size() if "dp" in adopted and "cp" not in adopted else 0
    if sizes["cp"] > 1 and fully_sharded == sizes["dp"] * sizes["cp"]:
        del adopted["dp"]  # parameters are cut over the ranks of both
    return build_mesh(sizes, process_group, adopted, device_type_of(module))


def _checked_against_model(mesh: ParallelMesh, module: nn.Module) -> ParallelMesh:
    """Refuse a mesh on which the model's tensor-parallel ranks are others than the model has."""
    group = groups_of(module).get("tp") if dist.is_initialized() else None
    due = dist.get_process_group_ranks(group) if group is not None else []
    found = list(mesh.along("tp").ranks) if mesh.size("tp") > 1 else [mesh.rank]
    if len(due) > 1 and found != due:
        raise ConfigurationError(
            f"The model is spread over the tensor-parallel ranks {due}, but the mesh has {found} "
            f"along tp of rank {mesh.rank}. Give the mesh that the model was parallelized with, "
            "its dims named."
        )
    return mesh
