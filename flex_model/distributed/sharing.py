"""Parameters that edits on shards share: their gradients add up over the ranks, once per backward.

An edit of the whole tensor runs alike on every rank, and so its modules get whole gradients. An
edit that works on shards gives every rank the terms of its own shard. Handing such edits the
parameters through one autograd node per forward lets autograd add up all their uses on the rank
first; the node's backward then sums over the ranks, all parameters in one flat tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from flex_model.distributed.collectives import all_reduce_sum
from flex_model.distributed.communicator import Communicator
from flex_model.distributed.mesh import ParallelMesh
from flex_model.layouts.layout import ActivationLayout

__all__ = ["SharedModules"]


class SharedModules:
    """The trainable modules, as edits on shards see them.

    Args:
        modules: the trainable modules.
        mesh: the job's ranks.
    """

    def __init__(self, modules: nn.ModuleDict, mesh: ParallelMesh) -> None:
        self._modules = modules
        self._mesh = mesh
        self._given: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._in_forward = False

    def begin_forward(self) -> None:
        """Each forward of the model has a node of its own."""
        self._given.clear()
        self._in_forward = True

    def end_forward(self) -> None:
        """Calls outside of a forward of the model have one each."""
        self._given.clear()
        self._in_forward = False

    @contextmanager
    def over(self, local: ActivationLayout) -> Iterator[None]:
        """While inside, gradients of the modules add up over the mesh dims of a shard."""
        if not local.dims or not torch.is_grad_enabled():
            yield
            return
        training = {n: p for n, p in self._modules.named_parameters() if p.requires_grad}
        if not training:
            yield
            return
        names = tuple(dim.name for dim in local.dims)
        given = self._given.get(names)
        if given is None or given.keys() != training.keys():
            scale = math.prod(dim.gradient_scale for dim in local.dims)
            shared = _Shared.apply(self._communicators(names), scale, *training.values())
            given = self._given[names] = dict(zip(training, shared, strict=True))
        with _reparametrize_module(self._modules, given):
            yield
        if not self._in_forward:
            self._given.clear()

    def _communicators(self, names: Sequence[str]) -> list[Communicator]:
        if set(names) == set(self._mesh.names) and self._mesh.everyone is not None:
            return [Communicator(self._mesh.everyone, self._mesh.watch)]
        return [self._mesh.along(name) for name in names]


class _Shared(torch.autograd.Function):
    """The identity on parameters; backward adds their gradients up over the ranks."""

    @staticmethod
    def forward(
        ctx: Any, ranks: Sequence[Communicator], scale: float, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.around = (ranks, scale)
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ranks, scale = ctx.around
        used = [gradient for gradient in gradients if gradient is not None]
        summed: list[Tensor | None] = list(gradients)
        for dtype in dict.fromkeys(gradient.dtype for gradient in used):
            at = [i for i, g in enumerate(gradients) if g is not None and g.dtype == dtype]
            flat = torch.cat([gradients[i].reshape(-1) for i in at])  # type: ignore[union-attr]
            for communicator in ranks:
                flat = all_reduce_sum(flat, communicator)
            flat = flat * scale
            parts = flat.split([gradients[i].numel() for i in at])  # type: ignore[union-attr]
            for i, part in zip(at, parts, strict=True):
                summed[i] = part.view_as(gradients[i])
        return None, None, *summed
