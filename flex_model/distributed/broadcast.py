"""Starting alike: one rank's parameters on every rank."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from flex_model.distributed.communicator import Communicator
from flex_model.distributed.mesh import ParallelMesh

__all__ = ["broadcast_module"]


def broadcast_module(module: nn.Module, mesh: ParallelMesh) -> None:
    """Overwrite parameters and buffers with the mesh's first rank's. Collective."""
    if mesh.everyone is None or not mesh.names:
        return
    ranks = Communicator(mesh.everyone, mesh.watch)
    if mesh.watch is not None:
        mesh.watch.where = "the registration of a trainable module"
    for tensor in (*module.parameters(), *module.buffers()):
        whole = tensor.detach()
        work = dist.broadcast(whole, src=mesh.ranks[0], group=mesh.everyone, async_op=True)
        ranks.finish(work, whole.device)
