"""What fairscale's model-parallel layers tell."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from flex_model.layouts.names import module_at
from flex_model.layouts.parallel_linear import WHOLE, tell_column, tell_row
from flex_model.layouts.sources import Site, Told, loaded, spread

__all__ = ["groups", "parameter", "tell"]

_LAYERS = "fairscale.nn.model_parallel.layers"
_STATE = "fairscale.nn.model_parallel.initialize"
# The dim of the weight that each layer cuts; only the column-parallel bias is cut with it.
_WEIGHT_DIM = {
    "ColumnParallelLinear": 0,
    "RowParallelLinear": 1,
    "VocabParallelEmbedding": 0,
    "ParallelEmbedding": 1,
}


def groups(root: nn.Module) -> Mapping[str, ProcessGroup]:
    """fairscale's (pipe, data, model) groups, if the model has any of its layers."""
    state = loaded(_STATE)
    if state is None or not state.model_parallel_is_initialized():
        return {}
    if not any(_kind(module) for module in root.modules()):
        return {}
    found = {
        "tp": state.get_model_parallel_group(),
        "dp": state.get_data_parallel_group(),
        "pp": state.get_pipeline_parallel_group(),
    }
    return spread(found)


def tell(site: Site) -> Told | None:
    """Layers of ``fairscale.nn.model_parallel.layers``; both embeddings return whole tensors."""
    kind = _kind(site.module)
    if kind == "ColumnParallelLinear":
        return tell_column(site.module, site.side, site.ndim)
    if kind == "RowParallelLinear":
        return tell_row(site.module, site.side, site.ndim)
    return WHOLE if kind else None


def parameter(root: nn.Module, name: str, tensor: Tensor) -> Placement | None:
    """Weights and biases of the parallel layers."""
    owner, _, leaf = name.rpartition(".")
    kind = _kind(module_at(root, owner))
    if kind is None or (leaf == "bias" and kind != "ColumnParallelLinear"):
        return None
    return Shard(_WEIGHT_DIM[kind])


def _kind(module: nn.Module) -> str | None:
    layers = loaded(_LAYERS)
    if layers is None:
        return None
    for name in _WEIGHT_DIM:
        if isinstance(module, getattr(layers, name)):
            return name
    return None
