"""A Llama of four layers on the stages of ``torch.distributed.pipelining``.

A stage is the whole model less what is not its own, so its modules keep the names that they have in
the whole one. Every stage makes the rotary tables itself: that module is on all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from flex_model.testing.case import Case, Data, Microbatch, Model, Schedule, Site, only
from frameworks import tiny_llama
from frameworks.tiny_llama import HEAD_DIM, HEADS, HIDDEN, INNER, VOCABULARY, Block, Layers, Rotary
from frameworks.values import fill, gather_grads

KV_HEADS = (2, 1, 2, 1)
LAYERS = len(KV_HEADS)
MICROBATCHES = 4

SITES = (
    Site("tok_embeddings", HIDDEN),
    # Of the whole batch, [sequence, width], on every stage: rolled along the sequence.
    Site("rotary", HEAD_DIM, ndim=2, backward=False, hard="rotary"),
    Site("layers.0.attention.wk", KV_HEADS[0] * HEAD_DIM, HIDDEN),
    # The two sides of the boundary between the stages.
    Site("layers.1", HIDDEN, HIDDEN),
    Site("layers.2", HIDDEN, HIDDEN),
    Site("layers.2.attention.wo", HIDDEN, HEADS * HEAD_DIM),
    Site("layers.3.feed_forward.act", INNER, INNER),
    Site("norm", HIDDEN, HIDDEN),
    Site("output", VOCABULARY, HIDDEN),
)

# One of each kind, where four ranks share the machine.
_FEW = ("tok_embeddings", "rotary", "layers.1", "layers.2", "output")


class PipelineLlama(nn.Module):
    """The whole model, which turns into one stage of it."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings: nn.Module | None = nn.Embedding(VOCABULARY, HIDDEN)
        self.rotary = Rotary()
        self.layers = nn.ModuleDict(
            {str(layer): Block(Layers(), kv_heads) for layer, kv_heads in enumerate(KV_HEADS)}
        )
        self.norm: nn.Module | None = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.output: nn.Module | None = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def keep_stage(self, stage: int, stages: int) -> None:
        """Delete what the other stages have."""
        own = torch.arange(LAYERS).chunk(stages)[stage].tolist()
        for layer in set(range(LAYERS)) - set(own):
            del self.layers[str(layer)]
        if stage > 0:
            self.tok_embeddings = None
        if stage < stages - 1:
            self.norm = self.output = None

    def forward(self, x: Tensor) -> Tensor:
        """Ids ``[batch, sequence]`` or what the stage before made of them; logits, or the same."""
        if self.tok_embeddings is not None:
            x = self.tok_embeddings(x)
        cos, sin = self.rotary(torch.arange(x.shape[1]))
        for layer in self.layers.values():
            x = layer(x, cos, sin)
        return x if self.output is None else self.output(self.norm(x))


@contextmanager
def whole() -> Iterator[Model]:
    """The one-process model."""
    module = PipelineLlama()
    fill(module, {})
    yield Model(module, tiny_llama.logits, "tok_embeddings", lambda: gather_grads(module, {}))


@contextmanager
def sharded(pp: int, dp: int, kind: type[PipelineScheduleSingle]) -> Iterator[Model]:
    """This rank's stage, over a mesh of (pp, dp)."""
    mesh = init_device_mesh("cpu", (pp, dp), mesh_dim_names=("pp", "dp"))
    module = PipelineLlama()
    module.keep_stage(mesh.get_local_rank("pp"), pp)
    fill(module, {})
    pp_group = mesh.get_group("pp")
    yield Model(
        module,
        tiny_llama.logits,
        "tok_embeddings",
        lambda: gather_grads(module, {}, dp_group=mesh.get_group("dp")),
        dp_rank=mesh.get_local_rank("dp"),
        schedule=_schedule(kind, pp_group),
        pp_group=pp_group,
    )


def _schedule(kind: type[PipelineScheduleSingle], pp_group: ProcessGroup) -> Schedule:
    """A step of torch's schedule; each is the first of its schedule, which learns shapes then."""

    def run(
        called: Any, microbatches: Sequence[Microbatch], loss: Callable[[Tensor, Tensor], Tensor]
    ) -> Sequence[Tensor]:
        number, stage, stages = len(microbatches), pp_group.rank(), pp_group.size()
        schedule = kind(
            PipelineStage(called, stage, stages, torch.device("cpu"), group=pp_group),
            number,
            loss_fn=lambda logits, labels: loss(logits, labels) / number,
            scale_grads=False,  # at its end, which gradients inside the model would not see
        )
        given = [torch.cat([ids for ids, _ in microbatches])] if stage == 0 else []
        target = torch.cat([labels for _, labels in microbatches]) if stage == stages - 1 else None
        logits = schedule.step(*given, target=target)
        return () if logits is None else logits.chunk(number)

    return run


def _case(name: str, kind: type[PipelineScheduleSingle], dp: int = 1) -> Case:
    return Case(
        name,
        1,
        dp,
        whole,
        partial(sharded, 2, dp, kind),
        SITES if dp == 1 else only(SITES, *_FEW),
        Data(microbatches=MICROBATCHES),
        pp=2,
    )


CASES = (
    _case("pipelining gpipe", ScheduleGPipe),
    _case("pipelining 1f1b", Schedule1F1B),
    _case("pipelining pp x dp", Schedule1F1B, dp=2),
)
