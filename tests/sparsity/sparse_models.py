"""A model that runs whole, tensor-parallel or data-parallel, and functions of every claim."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from flex_model import FlexModel, channelwise, elementwise, reduces

WIDTH, INNER, TOKENS, BATCH = 6, 8, 5, 4


class Mlp(nn.Module):
    """``[batch, tokens, 6]`` through 8 channels; the same values in every process."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(size, TOKENS, WIDTH, generator=generator) for size in sizes]


def inner(x: Tensor) -> Tensor:
    """What the down projection is given."""
    model = Mlp()
    return model.act(model.up(x)).detach()


@dataclass(frozen=True)
class Job:
    """``dp x tp`` ranks."""

    dp: int
    tp: int

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    def part(self, x: Tensor) -> Tensor:
        return x.chunk(self.dp)[dist.get_rank() // self.tp] if self.dp > 1 else x

    @contextmanager
    def model(self, **options: Any) -> Iterator[FlexModel]:
        mesh = init_device_mesh("cpu", (self.dp, self.tp), mesh_dim_names=("dp", "tp"))
        model = Mlp()
        if self.tp > 1:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(model, mesh["tp"], plan)
        with FlexModel(model, {}, mesh=mesh, **options) as flex:
            yield flex


@elementwise
def add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


def add_whole(a: Tensor, b: Tensor) -> Tensor:
    assert a.shape[-1] in (INNER, WIDTH), "a function that declares nothing is given all channels"
    return a + b


@elementwise
def largest(a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a, b)


@elementwise
def add_squares(a: Tensor, b: Tensor) -> Tensor:
    return a + b * b


def concatenated(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b])


@channelwise
def mean(x: Tensor) -> Tensor:
    return x.mean((0, 1))


def mean_whole(x: Tensor) -> Tensor:
    return x.mean((0, 1))


@channelwise
def mean_per_token(x: Tensor) -> Tensor:
    return x.mean(0)


@reduces("mean", over=(0, 1))
def mean_declared(x: Tensor) -> Tensor:
    return x.mean((0, 1), keepdim=True)


@channelwise
def peak(x: Tensor) -> Tensor:
    return x.amax((0, 1))


@channelwise
def mean_size(x: Tensor) -> Tensor:
    return x.abs().mean((0, 1))


@elementwise
def itself(x: Tensor) -> Tensor:
    return x


@elementwise
def above(x: Tensor, threshold: float) -> Tensor:
    return (x.abs() >= threshold).to(x.dtype)


@elementwise
def graded(x: Tensor) -> Tensor:
    """Tells every entry's value, where a mask of ones and zeros would hide an exchange."""
    return x.tanh()


def half(x: Tensor) -> Tensor:
    """The upper half of all entries: it must see them all."""
    return x >= x.flatten().median()
