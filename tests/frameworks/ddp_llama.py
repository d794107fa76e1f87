"""The tiny Llama under DistributedDataParallel: whole on every rank, the batch cut."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flex_model.testing.case import Case, Model
from frameworks import tiny_llama
from frameworks.tiny_llama import SITES
from frameworks.values import gather_grads


class Wrapped(nn.Module):
    """The model under the name that DistributedDataParallel gives it, and nothing else."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, ids: Tensor) -> Tensor:
        return self.module(ids)


@contextmanager
def whole() -> Iterator[Model]:
    """The one-process model."""
    yield model_on(Wrapped(tiny_llama.filled()))


@contextmanager
def sharded() -> Iterator[Model]:
    """One replica of it; its gradients are averaged by the time backward returns."""
    yield model_on(DistributedDataParallel(tiny_llama.filled()), dist.get_rank())


def model_on(module: nn.Module, rank: int = 0) -> Model:
    """What the grid needs to know of it on a rank."""
    return Model(
        module,
        tiny_llama.logits,
        "module.tok_embeddings",
        lambda: gather_grads(module, {}),
        dp_rank=rank,
    )


CASES = (
    Case(
        "ddp",
        1,
        2,
        whole,
        sharded,
        tuple(replace(site, name=f"module.{site.name}") for site in SITES),
    ),
)
