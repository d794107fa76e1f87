"""Fully sharded data parallelism: parameters are cut, activations are not.

In forward each rank has its own batch and the whole of a layer's parameters, so a layout is that of
plain data parallelism. Both generations tell their ranks. Between forwards the second's parameters
are DTensors, which tell themselves; those of the first are views of one flat tensor per unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import TrainingState
from torch.distributed.tensor.placement_types import Placement

from flex_model.errors import ConfigurationError
from flex_model.layouts.names import plain_name
from flex_model.layouts.sources import Site, Told

__all__ = ["cuts", "groups", "parameter", "parameter_groups", "tell", "unsharded"]


def groups(root: nn.Module) -> Mapping[str, ProcessGroup]:
    """The ranks that have a batch each.

    Where parameters are cut over some of them and copied to others (hybrid sharding), no group of
    both is at hand but that of all ranks, if they are all.
    """
    found, everyone = parameter_groups(root), dist.group.WORLD
    if len(found) > 1 and everyone is not None:
        together = math.prod(group.size() for group in found)
        found = [everyone] if together == everyone.size() else []
    return {"dp": found[0]} if found else {}


def parameter_groups(root: nn.Module) -> list[ProcessGroup]:
    """The groups of several ranks that the parameters are cut over, and copied to."""
    for module in root.modules():
        found: list[ProcessGroup | None] = []
        if isinstance(module, FullyShardedDataParallel):
            found = [module.process_group, getattr(module, "_inter_node_pg", None)]
        elif isinstance(module, FSDPModule):
            parameters = module._get_fsdp_state()._fsdp_param_group
            mesh = getattr(parameters, "mesh_info", None)
            names = ("shard_process_group", "replicate_process_group")
            found = [getattr(mesh, name, None) for name in names]
        several = [group for group in found if group is not None and group.size() > 1]
        if several:
            return several
    return []


@contextmanager
def unsharded(root: nn.Module, name: str) -> Iterator[bool]:
    """Whether a parameter is the first generation's, which its unit then holds whole while inside.

    Collective over the ranks that share the unit, unless this forward has made it whole already.

    Raises:
        ConfigurationError: a backward is under way that has cut the unit again.
    """
    units = _units_around(root, name)
    if not units:
        yield False
        return
    unit = units[-1]
    units[0].check_is_root()  # or the unit would take itself for the root, if no forward was yet
    if unit.training_state is not TrainingState.FORWARD_BACKWARD:
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            yield True
        return
    if unit._handle is not None and unit._handle.needs_unshard():
        raise ConfigurationError(
            f"Parameter {name} cannot be made whole while a backward of FSDP is under way. Ask for "
            "it before or after."
        )
    yield True


def cuts(root: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether a parameter's gradient takes FSDP's own way, past hooks on the parameter."""
    units = _units_around(root, name)
    if units:
        return parameter not in units[-1]._ignored_params
    groups = [
        group
        for module in root.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
    ]
    return any(held.sharded_param is parameter for group in groups for held in group.fsdp_params)


def _units_around(root: nn.Module, name: str) -> list[FullyShardedDataParallel]:
    """The first generation's units that a parameter lies in, the outermost first."""
    return [
        module
        for unit_name, module in root.named_modules()
        if isinstance(module, FullyShardedDataParallel)
        and name.startswith(f"{plain_name(unit_name, root)}.".lstrip("."))
    ]


def tell(site: Site) -> Told | None:
    """Nothing: parameters, not activations, are what FSDP cuts."""
    return None


def parameter(root: nn.Module, name: str, tensor: Tensor) -> Placement | None:
    """Nothing over the tensor-parallel ranks."""
    return None
