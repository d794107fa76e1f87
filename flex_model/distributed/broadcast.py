"""Starting alike: one rank's parameters on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from flex_model.distributed.mesh import ParallelMesh

__all__ = ["broadcast_module"]


def broadcast_module(module: nn.Module, mesh: ParallelMesh) -> None:
    """Overwrite parameters and buffers with the mesh's first rank's. Collective."""
    if mesh.everyone is None or not mesh.names:
        return
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, src=mesh.ranks[0], group=mesh.everyone)
