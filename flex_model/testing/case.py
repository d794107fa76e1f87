"""What the parity grid needs to know of a model: how to build it whole and sharded, where to hook.

The whole model is the truth, so it is built and hooked without this library. Both models take the
same parameter values, and their modules carry the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

__all__ = ["HARD_SITES", "Case", "Data", "Microbatch", "Model", "Schedule", "Site", "only"]

# Values that no weight tells of: whole on every rank but with a gradient that is not (rotary
# tables, key-value heads fewer than the ranks sharing them), lying between two sharded modules, or
# with tokens flattened behind which they go to the ranks of other experts (a router's scores).
HARD_SITES = ("rotary", "kv heads < ranks", "between shards", "router")


@dataclass(frozen=True)
class Site:
    """A hook point.

    Attributes:
        name: the module's name in the whole model.
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
        batch: sequences in each microbatch of each data-parallel rank.
        sequence: tokens in each.
        microbatches: forwards and backwards of one step.
    """

    vocabulary: int = 34
    batch: int = 3
    sequence: int = 10
    microbatches: int = 1

    def tokens(self, dp: int) -> tuple[Tensor, ...]:
        """Ids of each whole microbatch, ``[dp * batch, sequence + 1]``: inputs and, one on, labels.

        No two microbatches are the same.
        """
        shape = (self.microbatches, dp * self.batch, self.sequence + 1)
        generator = torch.Generator().manual_seed(11)
        return torch.randint(self.vocabulary, shape, generator=generator).unbind()


class Microbatch(NamedTuple):
    """What one forward takes: ids and labels, ``[batch, sequence]`` both."""

    ids: Tensor
    labels: Tensor


class Schedule(Protocol):
    """Runs a step: the forward and the backward of every microbatch, in an order of its own.

    Args:
        called: what is called for the model: its module, or the FlexModel that wraps it.
        microbatches: in their order, which is that of what comes back.
        loss: ``loss(logits, labels)`` of one microbatch. The step's loss is their mean, which the
            schedule takes.

    Returns:
        The logits of each microbatch; none on the stages of a pipeline that do not make them.
    """

    def __call__(
        self,
        called: Any,
        microbatches: Sequence[Microbatch],
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> Sequence[Tensor]: ...


@dataclass
class Model:
    """A built model on one rank: the whole of it, or one stage of a pipeline.

    Attributes:
        module: what is hooked and called.
        logits: ``logits(module, ids)``, ``[batch, sequence, vocabulary]``.
        embedding: name of the module whose output the input gradient is taken at, on the first
            stage.
        weight_grads: whole gradients of this stage's parameters, by the names that they have in the
            whole model, after the framework's own reduction and, where it has none over
            data-parallel ranks, their mean.
        dp_rank: which part of the whole batch this rank is given.
        embedding_batch_dim: the batch dim of the embedding's output.
        embedding_part: takes this rank's part of what is whole at the embedding's output, where the
            framework shards it along the sequence.
        parallelize: shards the module, for frameworks that let hooks be registered before.
        schedule: runs a step; None runs the microbatches one after the other through ``logits``.
        pp_group: the ranks that hold the other stages, the first stage first; None where there is
            one stage.
        cp: context-parallel ranks, each of which is called with its part of the sequences.
    """

    module: nn.Module
    logits: Callable[[Any, Tensor], Tensor]
    embedding: str
    weight_grads: Callable[[], Mapping[str, Tensor]]
    dp_rank: int = 0
    embedding_batch_dim: int = 0
    embedding_part: Callable[[Tensor], Tensor] = torch.clone
    parallelize: Callable[[], None] | None = None
    schedule: Schedule | None = None
    pp_group: ProcessGroup | None = None
    cp: int = 1

    @property
    def stages(self) -> int:
        """Stages of the pipeline that this model is one of."""
        return self.pp_group.size() if self.pp_group is not None else 1

    @property
    def is_first(self) -> bool:
        """Whether the embedding is on this stage."""
        return self.pp_group is None or self.pp_group.rank() == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage makes the logits."""
        return self.pp_group is None or self.pp_group.rank() == self.stages - 1


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
        pp: pipeline stages.
        cp: context-parallel ranks.
    """

    name: str
    tp: int
    dp: int
    whole: Callable[[], AbstractContextManager[Model]]
    sharded: Callable[[], AbstractContextManager[Model]]
    sites: tuple[Site, ...]
    data: Data = Data()
    pp: int = 1
    cp: int = 1

    def tolerance(self, quantity: str, *, on_shards: bool = False) -> float:
        """The largest relative error that float32 leaves room for.

        Tensor ranks each add up their part of a row-parallel product and the parts are added then:
        another order of the same sum, which everything downstream and every gradient inherits. Data
        ranks reorder the sum over the batch, in the gradients of weights only: the edit and its
        trainable module see the whole batch on every rank. Context ranks reorder no sum of the
        forward, but the one over queries in the gradients of keys and values, which all gradients
        before them inherit. Stages of a pipeline reorder nothing. An edit on shards has its
        module's gradients added up over the ranks.
        """
        over_queries = self.cp > 1 and quantity in ("input grad", "trainable grad")
        of_shards = on_shards and quantity == "trainable grad"
        reordered = self.tp > 1 or quantity == "weight grad" or over_queries or of_shards
        return 1e-5 if reordered else 1e-6

    @property
    def world_size(self) -> int:
        """Ranks that the sharded model takes."""
        return self.pp * self.dp * self.cp * self.tp
