"""A model of four layers on two pipeline stages, and what plain torch makes of it in one process.

The truth runs the microbatches one after the other, with torch's own hooks. Every layer and every
microbatch has values of its own, so that a swapped one shows.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.utils.checkpoint import checkpoint

from flex_model import FlexModel, HookFunction
from flex_model.testing.raw_hooks import hook_raw
from frameworks.values import fill

WIDTH, TOKENS, SAMPLES, MICROBATCHES = 6, 3, 2, 4
LAYERS, STAGES = 4, 2

Edit = Callable[[Any, Tensor, Any, Any], Tensor]
Hook = tuple[str, str, Edit | None]  # module, kind, editing function
Records = dict[str, list[Tensor]]
CASTS = {"bf16": torch.bfloat16, "f64": torch.float64, "i64": torch.int64, "bool": torch.bool}


class Cast(nn.Module):
    """A value of another dtype, on the way to nowhere."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x > 0 if self.dtype == torch.bool else (3 * x).to(self.dtype)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.casts = nn.ModuleDict({name: Cast(dtype) for name, dtype in CASTS.items()})

    def forward(self, x: Tensor) -> Tensor:
        for cast in self.casts.values():
            cast(x)
        return x + self.down(torch.tanh(self.up(x)))


class Scale(nn.Module):
    """On every stage, as rotary tables are: of one value, whatever the microbatch."""

    def forward(self, x: Tensor) -> Tensor:
        return 1 + x / 10


class Net(nn.Module):
    """The whole model, or one stage of it.

    Args:
        stages: which of them is kept, of how many; all for None.
        reentrant: how its layers are checkpointed; None if they are not.
    """

    def __init__(
        self, stage: int | None = None, stages: int = STAGES, reentrant: bool | None = None
    ) -> None:
        super().__init__()
        layers = range(LAYERS) if stage is None else torch.arange(LAYERS).chunk(stages)[stage]
        self.embed = nn.Linear(WIDTH, WIDTH) if stage in (None, 0) else None
        self.scale = Scale()
        self.layers = nn.ModuleDict({str(int(layer)): Layer() for layer in layers})
        self.head = nn.Linear(WIDTH, WIDTH) if stage in (None, stages - 1) else None
        self.reentrant = reentrant
        fill(self, {})

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        scale = self.scale(torch.arange(WIDTH))
        for layer in self.layers.values():
            x = x * scale
            if self.reentrant is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x if self.head is None else self.head(x)


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and weights of the loss, ``[microbatches * samples, tokens, width]``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (MICROBATCHES * SAMPLES, TOKENS, WIDTH)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def loss(output: Tensor, weights: Tensor) -> Tensor:
    return (output * weights).sum()


def probe(width: int = WIDTH, seed: int = 5) -> nn.Linear:
    """A trainable module with the same values in every process."""
    made = nn.Linear(width, width)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


@dataclass
class Truth:
    """One process: the whole model with torch's own hooks.

    Attributes:
        records: of each hook's module and kind, before the edit.
        save_ctx: what the editing functions stored.
        modules: the trainable ones, whose gradients are those of the microbatches' mean loss.
    """

    hooks: Sequence[Hook]
    modules: dict[str, nn.Module] = field(default_factory=dict)
    model: nn.Module = field(default_factory=Net)
    records: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)
    save_ctx: Namespace = field(default_factory=Namespace)
    outputs: list[Tensor] = field(default_factory=list)

    def step(self, seed: int = 1, backward: bool = True) -> "Truth":
        with ExitStack() as stack:
            for hook in self.hooks:
                visit = partial(self._visit, hook)
                handle = hook_raw(self.model.get_submodule(hook[0]), hook[1], 0, visit)
                stack.callback(handle.remove)
            before = {p: p.grad for p in self.parameters()}
            for parameter in before:
                parameter.grad = None
            for x, weights in zip(*(t.chunk(MICROBATCHES) for t in data(seed)), strict=True):
                self.outputs.append(self.model(x))
                if backward:
                    loss(self.outputs[-1], weights).backward()
        for parameter, earlier in before.items():
            if parameter.grad is not None:
                parameter.grad /= MICROBATCHES
                parameter.grad += 0 if earlier is None else earlier
            else:
                parameter.grad = earlier
        return self

    def parameters(self) -> list[nn.Parameter]:
        own = [p for module in self.modules.values() for p in module.parameters()]
        return [*self.model.parameters(), *own]

    def _visit(self, hook: Hook, value: Tensor) -> Tensor:
        name, kind, edit = hook
        self.records.setdefault((name, kind), []).append(value.detach().clone())
        if edit is None:
            return value
        return edit(self.model.get_submodule(name), value, self.save_ctx, self.modules)


def wrapped(
    hooks: Sequence[Hook] = (),
    modules: dict[str, nn.Module] | None = None,
    model: nn.Module | None = None,
    **options: Any,
) -> FlexModel:
    """This rank's stage with these hooks."""
    model = Net(dist.get_rank()) if model is None else model
    flex = FlexModel(model, {}, pipeline_parallel_size=STAGES, **options)
    for name, module in (modules or {}).items():
        flex.register_trainable_module(name, module)
    for name, kind, edit in hooks:
        register = getattr(flex, f"register_{kind}_hook")
        register(HookFunction(name, editing_function=edit))
    return flex


def schedule(
    called: nn.Module, kind: Any = Schedule1F1B, *, told: bool = False, **options: Any
) -> Any:
    """A new schedule, whose first step finds out shapes, or is told."""
    shape = torch.zeros(SAMPLES, TOKENS, WIDTH, requires_grad=True)
    shapes = {"input_args": shape, "output_args": shape} if told else {}
    stage = PipelineStage(called, dist.get_rank(), STAGES, torch.device("cpu"), **shapes)
    return kind(stage, MICROBATCHES, loss_fn=loss, **options)


def run(of: Any, seed: int = 1, *, backward: bool = True) -> Tensor | None:
    """One run of a schedule; the outputs, on the last stage."""
    x, weights = data(seed)
    first = dist.get_rank() == 0
    given = (x,) if first else ()
    if not backward:
        return of.eval(*given, target=None if first else weights)
    return of.step(*given, target=None if first else weights)


def step(flex: FlexModel, seed: int = 1, kind: Any = Schedule1F1B) -> Tensor | None:
    """One step of a new schedule."""
    with flex.step():
        return run(schedule(flex, kind), seed)
