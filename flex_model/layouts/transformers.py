"""What a transformers model loaded with a ``tp_plan`` (>= 5.16) tells.

Its layers take and return plain tensors; the plan names the style of each. The weight alone would
mislead: lm_head's is cut along the vocabulary while its output comes back gathered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from flex_model.layouts.names import named_modules
from flex_model.layouts.parallel_linear import WHOLE, sharded
from flex_model.layouts.sources import Dispatch, Site, Told, loaded

__all__ = ["dispatches", "groups", "parameter", "tell"]

_DISPATCHING = "ep_dispatch_experts"
# Each data-parallel rank has a batch of its own, however the parameters lie over them.
_DATA_PARALLEL = ("dp", "dp_replicate", "fsdp")

_OUTPUT_WHOLE = frozenset(
    {"colwise_gather_output", "colwise_rep", "rowwise", "rowwise_rep", "rowwise_split_input"}
    | {"embedding_rowwise", "embedding_colwise"}
)
_INPUT_WHOLE = frozenset(
    {"colwise", "colwise_gather_output", "colwise_rep", "rowwise_split_input", "packed_colwise"}
    | {"embedding_rowwise", "embedding_colwise"}
)


def groups(root: nn.Module) -> Mapping[str, ProcessGroup]:
    """The mesh that ``from_pretrained`` loaded onto."""
    model, _ = _pretrained(root)
    mesh = getattr(model, "_device_mesh", None)
    if model is None or mesh is None:
        return {}
    # This one has the replicas of hybrid sharding, which the other leaves out.
    mesh = getattr(getattr(model, "_mesh_manager", None), "_dense_mesh", mesh)
    if mesh.ndim == 1 and not set(mesh.mesh_dim_names or ()) & set(_DATA_PARALLEL):
        return {"tp": mesh.get_group()} if mesh.size() > 1 and _plan(model, "tp") else {}
    names = [name for name in mesh.mesh_dim_names or () if mesh[name].size() > 1]
    found = {name: mesh.get_group(name) for name in names if name in ("pp", "tp")}
    data_parallel = tuple(name for name in names if name in _DATA_PARALLEL)
    if data_parallel:
        found["dp"] = _joined(mesh, data_parallel)
    return found


def _joined(mesh: DeviceMesh, names: tuple[str, ...]) -> ProcessGroup:
    """The ranks along several dims in one group, which torch makes once and keeps."""
    if len(names) == 1:
        return mesh.get_group(names[0])
    return mesh[names]._flatten("dp").get_group()


def tell(site: Site) -> Told | None:
    """By the plan's style for this module; other modules are left to the trace."""
    style = _style(site)
    if style == _DISPATCHING:
        return WHOLE  # the ranks of a tensor group share out the tokens, and gather what comes back
    if style is None or site.index > 0:
        return None
    if site.side == "input":
        if style in _INPUT_WHOLE:
            return WHOLE
        return sharded(Shard(site.ndim - 1)) if style in ("rowwise", "rowwise_rep") else None
    if style in _OUTPUT_WHOLE:
        return WHOLE
    if style == "colwise":
        return sharded(Shard(site.ndim - 1))
    if style == "packed_colwise":
        return sharded(_StridedShard(site.ndim - 1, split_factor=2))
    return None


def parameter(root: nn.Module, name: str, tensor: Tensor) -> Placement | None:
    """Nothing: cut parameters are DTensors, which tell themselves."""
    return None


def dispatches(root: nn.Module) -> Iterator[Dispatch]:
    """Modules that run the experts, whether or not their plan is in use."""
    model, prefix = _pretrained(root)
    if model is None:
        return
    plan = getattr(model, "ep_plan", None) or {}
    for name, _ in named_modules(root):
        own = name.removeprefix(prefix)
        if name.startswith(prefix) and _by_name(plan, own) == _DISPATCHING:
            yield Dispatch(
                boundary=name,
                experts=name,
                ranks=_size(model, "ep"),
                numbered_anew=False,  # they are slices of DTensors, which tell themselves
                instead=f"{name} itself, or the router that chooses the experts",
            )


def _style(site: Site) -> str | None:
    """The style in use; experts shared out over ranks, and what is below them, have no other."""
    model, prefix = _pretrained(site.root)
    if model is None or not site.name.startswith(prefix):
        return None
    name, plan = site.name.removeprefix(prefix), _plan(model, "ep")
    around = name
    while around:
        if _by_name(plan, around) is not None:
            return _by_name(plan, name)
        around = around.rpartition(".")[0]
    return _by_name(_plan(model, "tp"), name)


def _by_name(plan: Mapping[str, str], name: str) -> str | None:
    """A plan's style of a module; layers go by a star in place of their number."""
    return plan.get(name) or plan.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name))


def _plan(model: nn.Module, kind: str) -> Mapping[str, str]:
    """The plan that the model was spread by; a model that was not has one all the same."""
    return getattr(model, f"{kind}_plan", None) or {} if _size(model, kind) > 1 else {}


def _size(model: nn.Module, kind: str) -> int:
    """Ranks that a plan's layers are spread over."""
    mesh, manager = getattr(model, "_device_mesh", None), getattr(model, "_mesh_manager", None)
    if mesh is None:
        return 1
    if manager is not None:
        # Asked of every module: a slice of the mesh would be built anew each time.
        mesh = manager._expert_mesh if kind == "ep" else manager._dense_mesh
        return int(mesh.size(mesh.mesh_dim_names.index(kind)))
    if mesh.ndim == 1:
        return int(mesh.size()) if kind == "tp" else 1
    return int(mesh[kind].size()) if kind in (mesh.mesh_dim_names or ()) else 1


def _pretrained(root: nn.Module) -> tuple[nn.Module | None, str]:
    """The transformers model below a wrapper such as DDP, and its name there as a prefix."""
    library = loaded("transformers.modeling_utils")
    if library is None:
        return None, ""
    if isinstance(root, library.PreTrainedModel):
        return root, ""
    for name, module in named_modules(root):
        if isinstance(module, library.PreTrainedModel):
            return module, f"{name}." if name else ""
    return None, ""
