"""What a transformers model loaded with a ``tp_plan`` (>= 5.16) tells.

Its layers take and return plain tensors; the plan names the style of each. The weight alone would
mislead: lm_head's is cut along the vocabulary while its output comes back gathered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from flex_model.layouts.names import named_modules
from flex_model.layouts.parallel_linear import WHOLE, sharded
from flex_model.layouts.sources import Site, Told, loaded

__all__ = ["groups", "parameter", "tell"]

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
    if mesh is None or not getattr(model, "tp_plan", None):
        return {}
    if mesh.ndim == 1:
        return {"tp": mesh.get_group()} if mesh.size() > 1 else {}
    names = mesh.mesh_dim_names or ()
    return {n: mesh.get_group(n) for n in ("dp", "tp") if n in names and mesh[n].size() > 1}


def tell(site: Site) -> Told | None:
    """By the plan's style for this module; other modules are left to the trace."""
    style = _style(site)
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


def _style(site: Site) -> str | None:
    model, prefix = _pretrained(site.root)
    if model is None or getattr(model, "_device_mesh", None) is None:
        return None
    plan = getattr(model, "tp_plan", None) or {}
    if not site.name.startswith(prefix):
        return None
    name = site.name.removeprefix(prefix)
    return plan.get(name) or plan.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name))


def _pretrained(root: nn.Module) -> tuple[nn.Module | None, str]:
    """The transformers model below a wrapper such as DDP, and its name there as a prefix."""
    library = loaded("transformers.modeling_utils")
    if library is None:
        return None, ""
    for name, module in named_modules(root):
        if isinstance(module, library.PreTrainedModel):
            return module, f"{name}." if name else ""
    return None, ""
