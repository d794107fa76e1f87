"""One step of a case, forwards and backwards of its microbatches, and what is compared of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flex_model.testing.case import Case, Microbatch, Model, Schedule
from flex_model.testing.compare import relative_error

__all__ = ["Outcome", "differences", "take_step"]


@dataclass
class Outcome:
    """What one step left behind on this rank.

    Attributes:
        logits: the model's output for each microbatch, on the last stage.
        input_grads: the gradient at the embedding's output for each microbatch, on the first stage.
        weight_grads: whole gradients of this stage's parameters, by name.
        records: what the hook saw, one tensor per call.
        probe_grads: gradients of the edit's trainable module, by name.
    """

    logits: list[Tensor]
    input_grads: list[Tensor]
    weight_grads: Mapping[str, Tensor]
    records: list[Tensor] = field(default_factory=list)
    probe_grads: dict[str, Tensor] = field(default_factory=dict)

    def note_hook(self, records: list[Tensor], probe: nn.Module) -> Outcome:
        """Add what the hook saw, and the gradients that its trainable module got."""
        self.records = records
        grads = ((name, parameter.grad) for name, parameter in probe.named_parameters())
        self.probe_grads = {name: grad for name, grad in grads if grad is not None}
        return self


def take_step(
    case: Case,
    model: Model,
    called: Any,
    replicas: int,
    around: AbstractContextManager[Any] | None = None,
) -> Outcome:
    """Forward, mean loss over the replicas' parts of the batch and over microbatches, backward.

    Args:
        case: tells the batch.
        model: the model on this rank.
        called: what is called in its place: the module, or its FlexModel.
        replicas: into how many parts the batch is cut over ranks; 1 where one process takes all.
        around: entered for the forwards and backwards.
    """
    parts = [tokens.chunk(replicas)[model.dp_rank] for tokens in case.data.tokens(case.dp)]
    microbatches = [Microbatch(tokens[:, :-1], tokens[:, 1:]) for tokens in parts]
    run = model.schedule or _one_after_the_other(model.logits)
    model.module.zero_grad()
    with _embedded(model) as embedded, around or nullcontext():
        logits = run(called, microbatches, partial(_mean_loss, parts=case.dp // replicas))
    # A schedule may call the model once more, to learn shapes: no gradient is left there.
    input_grads = [output.grad for output in embedded if output.grad is not None]
    if len(input_grads) != (len(microbatches) if model.is_first else 0):
        raise RuntimeError(f"{len(input_grads)} gradients reached the embedding of {case.name}")
    return Outcome([output.detach() for output in logits], input_grads, model.weight_grads())


def _one_after_the_other(logits: Callable[[Any, Tensor], Tensor]) -> Schedule:
    """The schedule of models that are no pipeline: each microbatch forward and at once backward."""

    def run(
        called: Any,
        microbatches: Sequence[Microbatch],
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> list[Tensor]:
        outputs = []
        for ids, labels in microbatches:
            outputs.append(logits(called, ids))
            (loss(outputs[-1], labels) / len(microbatches)).backward()
        return outputs

    return run


@contextmanager
def _embedded(model: Model) -> Iterator[list[Tensor]]:
    """Collects what the embedding returns while inside, each to keep its gradient."""
    embedded: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    if not model.is_first:
        yield embedded
        return
    handle = model.module.get_submodule(model.embedding).register_forward_hook(keep)
    try:
        yield embedded
    finally:
        handle.remove()


def _mean_loss(logits: Tensor, labels: Tensor, parts: int) -> Tensor:
    """The mean over parts of the batch of each part's loss: what data-parallel ranks compute."""
    losses = [
        F.cross_entropy(logit.flatten(0, 1), label.flatten())
        for logit, label in zip(logits.chunk(parts), labels.chunk(parts), strict=True)
    ]
    return sum(losses, start=logits.new_zeros(())) / parts


def differences(
    case: Case, model: Model, actual: Outcome, expected: Outcome
) -> dict[str, tuple[float, str]]:
    """How far a rank's step lies from one process: relative error and worst tensor, by quantity.

    The rank's own logits and input gradients are its part of the batch. The one process took the
    mean over replicas, so the rank's input gradients are that many times the other's. What lies on
    one stage is due there and on no other; the gradients of the model's parameters are
    looked at over all stages, those of trainable modules are due whole on every rank.
    Records are due on the first rank alone.
    """
    if model.stages != case.pp:
        raise RuntimeError(f"{case.name} has {case.pp} stages, its model was given {model.stages}")
    dp, at = case.dp, model.dp_rank
    logits = [whole.chunk(dp)[at] for whole in expected.logits] if model.is_last else []
    input_grads = [
        model.embedding_part(whole.chunk(dp, model.embedding_batch_dim)[at] * dp)
        for whole in (expected.input_grads if model.is_first else [])
    ]
    records = expected.records if dist.get_rank() == 0 else []
    return {
        "output": _worst(_numbered(actual.logits), _numbered(logits)),
        "input grad": _worst(_numbered(actual.input_grads), _numbered(input_grads)),
        "weight grad": _worst(_over_stages(model, actual.weight_grads), expected.weight_grads),
        "trainable grad": _worst(actual.probe_grads, expected.probe_grads),
        "record": _worst(_numbered(actual.records), _numbered(records)),
    }


def _over_stages(model: Model, grads: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The gradients of all stages, by name: the sum where a module is on several of them."""
    if model.pp_group is None:
        return grads
    by_stage: list[Any] = [None] * model.stages
    dist.all_gather_object(by_stage, dict(grads), group=model.pp_group)
    total: dict[str, Tensor] = {}
    for of_stage in by_stage:
        for name, grad in of_stage.items():
            total[name] = total[name] + grad if name in total else grad
    return total


def _numbered(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"call {number}": tensor for number, tensor in enumerate(tensors)}


def _worst(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative error over named tensors; one that only one side has counts as inf."""
    errors = {
        name: relative_error(actual.get(name), expected.get(name))
        for name in sorted(actual.keys() | expected.keys())
    }
    name = max(errors, key=lambda name: errors[name], default="")
    return errors.get(name, 0.0), name
