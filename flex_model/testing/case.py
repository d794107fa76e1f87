"""What the parity grid needs to know of a model: how to build it whole and sharded, where to hook.

The whole model is the truth, so it is built and hooked without this library. Both models take the
same parameter values, and their modules carry the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HARD_SITES", "Case", "Data", "Model", "Site", "only"]

# Values that no weight tells of: whole on every rank but with a gradient that is not (rotary
# tables, key-value heads fewer than the ranks sharing them), or lying between two sharded modules.
HARD_SITES = ("rotary", "kv heads < ranks", "between shards")


@dataclass(frozen=True)
class Site:
    """A hook point.

    Attributes:
        name: the module's name.
        index: which tensor of its output is hooked; pre-hooks always take the first input.
        width: whole size of the last dim of that output, which edits mix.
        input_width: the same of the first input; None where the input is no float tensor.
        batch_dim: the dim of the output and input that the batch lies along, or, for a value that
            has none, any dim: edits roll the value along it.
        ndim: dims of the output.
        input_ndim: dims of the first input; None means as the output.
        backward: whether a gradient passes here that torch's module backward hooks see: not where
            the module computes without a graph.
        keywords_only: whether the module is called without positional arguments, of which alone
            torch's full backward hooks see the gradients.
        hard: which of ``HARD_SITES`` it is, if one.
    """

    name: str
    width: int
    input_width: int | None = None
    index: int = 0
    batch_dim: int = 0
    ndim: int = 3
    input_ndim: int | None = None
    backward: bool = True
    keywords_only: bool = False
    hard: str = ""

    def __str__(self) -> str:
        return f"{self.name}[{self.index}]" if self.index else self.name

    def hint(self, side: str) -> tuple[int | None, ...]:
        """The ``expected_shape`` of the ``"output"`` or ``"input"``: its width, the rest None."""
        if side == "output":
            return (*[None] * (self.ndim - 1), self.width)
        return (*[None] * ((self.input_ndim or self.ndim) - 1), self.input_width)


def only(sites: Iterable[Site], *names: str) -> tuple[Site, ...]:
    """Those of the sites with these names, for rows that take too many ranks to visit them all."""
    return tuple(site for site in sites if str(site) in names)


@dataclass(frozen=True)
class Data:
    """Sizes of the batch, each another number than every size of the model.

    Attributes:
        vocabulary: tokens are drawn below this.
        batch: sequences on each data-parallel rank.
        sequence: tokens in each.
    """

    vocabulary: int = 34
    batch: int = 3
    sequence: int = 10

    def tokens(self, dp: int) -> Tensor:
        """Ids of the whole batch, ``[dp * batch, sequence + 1]``: inputs and, one on, labels."""
        shape = (dp * self.batch, self.sequence + 1)
        return torch.randint(self.vocabulary, shape, generator=torch.Generator().manual_seed(11))


@dataclass
class Model:
    """A built model on one rank.

    Attributes:
        module: what is hooked and called.
        logits: ``logits(module, ids)``, ``[batch, sequence, vocabulary]``.
        embedding: name of the module whose output the input gradient is taken at.
        weight_grads: whole gradients by name, after the framework's own reduction and, where it has
            none over data-parallel ranks, their mean.
        dp_rank: which part of the whole batch this rank is given.
        embedding_batch_dim: the batch dim of the embedding's output.
        embedding_part: takes this rank's part of what is whole at the embedding's output, where the
            framework shards it along the sequence.
        parallelize: shards the module, for frameworks that let hooks be registered before.
    """

    module: nn.Module
    logits: Callable[[Any, Tensor], Tensor]
    embedding: str
    weight_grads: Callable[[], Mapping[str, Tensor]]
    dp_rank: int = 0
    embedding_batch_dim: int = 0
    embedding_part: Callable[[Tensor], Tensor] = torch.clone
    parallelize: Callable[[], None] | None = None


@dataclass(frozen=True)
class Case:
    """A row of the grid.

    Attributes:
        name: the row's name.
        tp: tensor-parallel ranks.
        dp: data-parallel ranks.
        whole: builds the one-process model, inside a group of one rank, and takes it down.
        sharded: builds this rank's part of the model, and takes it down.
        sites: where to hook.
        data: sizes of the batch.
    """

    name: str
    tp: int
    dp: int
    whole: Callable[[], AbstractContextManager[Model]]
    sharded: Callable[[], AbstractContextManager[Model]]
    sites: tuple[Site, ...]
    data: Data = Data()

    def tolerance(self, quantity: str) -> float:
        """The largest relative error that float32 leaves room for.

        Tensor ranks each add up their part of a row-parallel product and the parts are added then:
        another order of the same sum, which everything downstream and every gradient inherits. Data
        ranks reorder the sum over the batch, in the gradients of weights only: the edit and its
        trainable module see the whole batch on every rank.
        """
        reordered = self.tp > 1 or quantity == "weight grad"
        return 1e-5 if reordered else 1e-6

    @property
    def world_size(self) -> int:
        """Ranks that the sharded model takes."""
        return self.tp * self.dp
