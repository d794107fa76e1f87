"""A gated MLP whose sizes the ranks do not divide, sharded by torch's ``parallelize_module``.

Of 5 inner features two ranks hold 3 and 2; of 9, four ranks hold 3, 3, 3 and none. Torch's styles
hand out plain tensors by default, which loses the uneven sizes and fails inside torch, so all of
them are asked for DTensors here. So is the stream between the blocks where it is cut along the
sequence, of which two ranks hold 6 and 5 tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from flex_model.testing.case import Case, Data, Model, Site, only
from frameworks.values import fill, gather_grads

HIDDEN = 7
VOCABULARY = 37
_DATA = Data(VOCABULARY, sequence=11)
LAYERS = 2


class Gated(nn.Module):
    """``x + w2(act(w1(x)) * w3(x))``."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.w1 = nn.Linear(HIDDEN, inner)
        self.w3 = nn.Linear(HIDDEN, inner)
        self.act = nn.SiLU()
        self.w2 = nn.Linear(inner, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.w2(self.act(self.w1(y)) * self.w3(y))


class UnevenMlp(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.stream = nn.Identity()
        self.layers = nn.ModuleList(Gated(inner) for _ in range(LAYERS))
        self.output = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.stream(self.embedding(ids))
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


def _filled(inner: int) -> UnevenMlp:
    module = UnevenMlp(inner)
    fill(module, {})
    return module


def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    return module(ids)


def _model(module: nn.Module) -> Model:
    return Model(module, _logits, "embedding", lambda: gather_grads(module, {}))


@contextmanager
def whole(inner: int) -> Iterator[Model]:
    """The one-process model."""
    yield _model(_filled(inner))


@contextmanager
def sharded(inner: int, tp: int, sequence_parallel: bool = False) -> Iterator[Model]:
    """This rank's part, which may be none."""
    mesh = init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))
    plan = _sequence_plan() if sequence_parallel else _plan()
    yield _model(parallelize_module(_filled(inner), mesh, plan))


def _plan() -> dict[str, ParallelStyle]:
    """DTensors between column- and row-parallel layers, plain tensors between the blocks."""
    plan: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "output": ColwiseParallel(output_layouts=Replicate()),
    }
    for layer in range(LAYERS):
        for name in ("w1", "w3"):
            plan[f"layers.{layer}.{name}"] = ColwiseParallel(use_local_output=False)
        plan[f"layers.{layer}.w2"] = RowwiseParallel()
    return plan


def _sequence_plan() -> dict[str, ParallelStyle]:
    """DTensors everywhere but at the model's ends; cut along the sequence between the blocks."""
    stream = Shard(1)
    plan: dict[str, ParallelStyle] = {
        "stream": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=stream),
        "output": ColwiseParallel(input_layouts=stream, output_layouts=Replicate()),
    }
    for layer in range(LAYERS):
        plan[f"layers.{layer}.norm"] = SequenceParallel()
        for name in ("w1", "w3"):
            plan[f"layers.{layer}.{name}"] = ColwiseParallel(
                input_layouts=stream, use_local_output=False
            )
        plan[f"layers.{layer}.w2"] = RowwiseParallel(output_layouts=stream, use_local_output=False)
    return plan


def _sites(inner: int) -> tuple[Site, ...]:
    return (
        Site("embedding", HIDDEN),
        Site("layers.0", HIDDEN, HIDDEN),
        Site("layers.0.w1", inner, HIDDEN),
        Site("layers.1.act", inner, inner, hard="between shards"),
        Site("layers.0.w2", HIDDEN, inner),
        Site("layers.1.norm", HIDDEN, HIDDEN),
        Site("output", VOCABULARY, HIDDEN),
    )


# One of each kind, where four ranks share the machine.
_FEW = ("embedding", "layers.0.w1", "layers.1.act", "layers.0.w2")


def _case(name: str, inner: int, tp: int, **options: bool) -> Case:
    sites = _sites(inner) if tp == 2 else only(_sites(inner), *_FEW)
    build = partial(sharded, inner, tp, **options)
    return Case(name, tp, 1, partial(whole, inner), build, sites, _DATA)


CASES = (
    _case("dtensor uneven", 5, 2),
    _case("dtensor uneven sequence", 5, 2, sequence_parallel=True),
    _case("dtensor uneven empty", 9, 4),
)
