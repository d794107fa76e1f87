"""What megatron-core's tensor-parallel layers tell.

Activations are ``[sequence, batch, hidden]``; under sequence parallelism dim 0 is cut outside the
parallel regions. Layers return ``(output, bias)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from flex_model.layouts.names import module_at, named_modules
from flex_model.layouts.parallel_linear import WHOLE, sharded, tell_column, tell_row
from flex_model.layouts.sources import Dispatch, Site, Told, loaded, spread

__all__ = ["dispatches", "groups", "handed_over", "parameter", "tell"]

_EXPERTS = "megatron.core.transformer.moe.moe_layer"
_LAYERS = "megatron.core.tensor_parallel.layers"
_STATE = "megatron.core.parallel_state"


def groups(root: nn.Module) -> Mapping[str, ProcessGroup]:
    """Megatron's tensor, context, data and pipeline groups, if the model has its layers."""
    state = loaded(_STATE)
    if state is None or not state.model_parallel_is_initialized():
        return {}
    if not any(_kind(module) for module in root.modules()):
        return {}
    found = {
        "tp": state.get_tensor_model_parallel_group(),
        "cp": state.get_context_parallel_group(check_initialized=False),
        "dp": state.get_data_parallel_group(),
        "pp": state.get_pipeline_model_parallel_group(),
    }
    return spread(found)


def handed_over(root: nn.Module) -> Iterator[tuple[Tensor, Mapping[str, Placement]]]:
    """What the stage before handed over beside the arguments: ``[sequence, batch, hidden]``."""
    blocks = loaded("megatron.core.transformer.transformer_block")
    if blocks is None:
        return
    for module in root.modules():
        if isinstance(module, blocks.TransformerBlock) and isinstance(module.input_tensor, Tensor):
            over_tp = Shard(0) if module.config.sequence_parallel else Replicate()
            yield module.input_tensor, {"tp": over_tp, "cp": Shard(0), "dp": Shard(1)}


def tell(site: Site) -> Told | None:
    """Column, Row and VocabParallelEmbedding, from their own fields."""
    kind = _kind(site.module)
    if kind is None and _is_core_attention(site.module):
        return _tell_core_attention(site)
    if kind is None or getattr(site.module, "explicit_expert_comm", False):
        return None
    if kind == "ColumnParallelLinear":
        return _tell_column(site)
    if kind == "RowParallelLinear":
        return _tell_row(site)
    scattered = site.side == "output" and site.module.reduce_scatter_embeddings
    return sharded(Shard(0)) if scattered else WHOLE


def parameter(root: nn.Module, name: str, tensor: Tensor) -> Placement | None:
    """Megatron marks every cut parameter with its dim; a gated layer's holds ``[gate | up]``."""
    if not getattr(tensor, "tensor_model_parallel", False):
        return None
    owner = name.rpartition(".")[0]
    dim: int = tensor.partition_dim  # type: ignore[attr-defined]
    return _StridedShard(dim, split_factor=2) if _is_gated(root, owner) and dim == 0 else Shard(dim)


def dispatches(root: nn.Module) -> Iterator[Dispatch]:
    """Layers of experts; the router and the shared experts see tokens before they are sent."""
    moe = loaded(_EXPERTS)
    if moe is None:
        return
    for name, module in named_modules(root):
        if isinstance(module, moe.MoELayer):
            path = f"{name}." if name else ""
            yield Dispatch(
                boundary=name,
                experts=f"{path}experts",
                ranks=module.ep_group.size() if module.ep_group is not None else 1,
                numbered_anew=True,
                instead=f"{path}router (its scores) or {name or 'the layer'} (what comes back)",
            )


def _tell_column(site: Site) -> Told:
    module = site.module
    if site.side == "input":
        if module.sequence_parallel:
            return sharded(Shard(0))
        summed = module.allreduce_dgrad
        return Told(Replicate(), Replicate() if summed else Partial())
    if site.index == 1:  # the bias, handed out to be added (and fused) later
        return WHOLE if module.gather_output else sharded(Shard(0))
    told = tell_column(module, site.side, site.ndim)
    if isinstance(told.value, Shard) and _is_gated(site.root, site.name):
        return sharded(_StridedShard(site.ndim - 1, split_factor=2))
    return told


def _tell_row(site: Site) -> Told:
    parallel = site.module.sequence_parallel
    if site.side == "output" and parallel:
        # Each rank adds the whole bias to its own part of the sequence only.
        return sharded(Shard(0)) if site.index == 0 else Told(Replicate(), Partial())
    return tell_row(site.module, site.side, site.ndim)


def _tell_core_attention(site: Site) -> Told | None:
    """Queries ``[sequence, batch, heads, width]`` and the output ``[sequence, batch, features]``.

    Told because a rank may have cut them out of gathered heads by its rank, which no trace sees.
    Keys and values of fewer heads than ranks are left open: ranks share them.
    """
    if site.side == "output":
        return sharded(Shard(2)) if site.index == 0 else None
    config: Any = site.module.config
    shared = config.num_query_groups < config.tensor_model_parallel_size
    whole_heads = site.index == 0 or (site.index < 3 and not shared)
    return sharded(Shard(2)) if whole_heads and site.ndim == 4 else None


def _is_core_attention(module: nn.Module) -> bool:
    attention = loaded("megatron.core.transformer.dot_product_attention")
    return attention is not None and isinstance(module, attention.DotProductAttention)


def _is_gated(root: nn.Module, name: str) -> bool:
    """Whether a layer computes ``[gate | up]`` in one weight: each rank holds a slice of both."""
    parent, _, leaf = name.rpartition(".")
    if leaf != "linear_fc1":
        return False
    config = getattr(module_at(root, parent), "config", None)
    return bool(getattr(config, "gated_linear_unit", False))


def _kind(module: nn.Module) -> str | None:
    layers = loaded(_LAYERS)
    if layers is None:
        return None
    for name in ("ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding"):
        if isinstance(module, getattr(layers, name)):
            return name
    return None
