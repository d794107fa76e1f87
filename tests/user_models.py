"""Factories as a user of ``flex-model check`` may write them, right and wrong.

All make the same little language model. Sharded over two ranks, its ``up`` and ``down`` are a
column- and a row-parallel layer, and ``own_up`` and ``own_down`` are the same by hand, of which
nothing tells that they are.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

VOCABULARY, HIDDEN, INNER = 29, 12, 16


class _Copy(torch.autograd.Function):
    """The same on every rank, each of which brings a term of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient


class _Sum(torch.autograd.Function):
    """The sum of the ranks' terms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class OwnUp(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_Copy.apply(x) if dist.get_world_size() > 1 else x)


class OwnDown(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return _Sum.apply(y) if dist.get_world_size() > 1 else y


class Little(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.up = nn.Linear(HIDDEN, INNER, bias=False)
        self.act = nn.GELU()
        self.down = nn.Linear(INNER, HIDDEN, bias=False)
        self.own_up = OwnUp(HIDDEN, INNER, bias=False)
        self.own_down = OwnDown(INNER, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(self.act(self.up(x)))
        x = x + self.own_down(torch.tanh(self.own_up(x)))
        return self.head(x)


def _whole() -> Little:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Little()


def _sharded() -> Little:
    model, rank, ranks = _whole(), dist.get_rank(), dist.get_world_size()
    with torch.no_grad():
        for layer, dim in ((model.own_up, 0), (model.own_down, 1)):
            layer.weight = nn.Parameter(layer.weight.chunk(ranks, dim)[rank].contiguous())
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def right(whole: bool) -> nn.Module:
    return _whole() if whole else _sharded()


def swapped(whole: bool) -> nn.Module:
    """Computes what the whole model does, but each rank holds the features of the other."""
    if whole:
        return _whole()
    model = _sharded()
    with torch.no_grad():
        for layer, dim in ((model.up, 0), (model.down, 1)):
            parts = layer.weight.full_tensor().chunk(2, dim)
            layer.weight.to_local().copy_(parts[1 - dist.get_rank()])
    return model


def copied(whole: bool) -> nn.Module:
    """The whole model on every rank, for data parallelism."""
    model = _whole()
    model.own_up.forward = partial(nn.Linear.forward, model.own_up)
    model.own_down.forward = partial(nn.Linear.forward, model.own_down)
    return model


def other_weights(whole: bool) -> nn.Module:
    """Is another model on the ranks."""
    model = right(whole)
    if not whole:
        with torch.no_grad():
            model.head.weight.mul_(1.01)
    return model


def raises_on_one_rank(whole: bool) -> nn.Module:
    """Cannot be built on rank 1."""
    if not whole and dist.get_rank() == 1:
        raise ValueError("no weights for this rank")
    return right(whole)


def no_module(whole: bool) -> str:
    return "a model"
