"""Fully sharded data parallelism: parameters are cut, activations are not.

In forward each rank has its own batch and the whole of a layer's parameters, so a layout is that of
plain data parallelism. Both generations tell their ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor.placement_types import Placement

from flex_model.layouts.sources import Site, Told

__all__ = ["groups", "parameter", "tell"]


def groups(root: nn.Module) -> Mapping[str, ProcessGroup]:
    """The ranks that share parameters, and so have a batch each."""
    for module in root.modules():
        group = None
        if isinstance(module, FullyShardedDataParallel):
            group = module.process_group
        elif isinstance(module, FSDPModule):
            parameters = module._get_fsdp_state()._fsdp_param_group
            group = getattr(getattr(parameters, "mesh_info", None), "shard_process_group", None)
        if group is not None and group.size() > 1:
            return {"dp": group}
    return {}


def tell(site: Site) -> Told | None:
    """Nothing: parameters, not activations, are what FSDP cuts."""
    return None


def parameter(root: nn.Module, name: str, tensor: Tensor) -> Placement | None:
    """Nothing over the tensor-parallel ranks."""
    return None
