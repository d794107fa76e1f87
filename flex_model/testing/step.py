"""One forward and backward of a case, and what is compared of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flex_model.testing.case import Case, Model
from flex_model.testing.compare import relative_error

__all__ = ["Outcome", "differences", "take_step"]


@dataclass
class Outcome:
    """What one step left behind.

    Attributes:
        logits: the model's output.
        input_grad: the gradient at the embedding's output.
        weight_grads: whole gradients of the model's parameters, by name.
        records: what the hook saw, one tensor per call.
        probe_grads: gradients of the edit's trainable module, by name.
    """

    logits: Tensor
    input_grad: Tensor
    weight_grads: Mapping[str, Tensor]
    records: list[Tensor] = field(default_factory=list)
    probe_grads: dict[str, Tensor] = field(default_factory=dict)

    def note_hook(self, records: list[Tensor], probe: nn.Module) -> Outcome:
        """Add what the hook saw, and the gradients that its trainable module got."""
        self.records = records
        grads = ((name, parameter.grad) for name, parameter in probe.named_parameters())
        self.probe_grads = {name: grad for name, grad in grads if grad is not None}
        return self


def take_step(case: Case, model: Model, call: Any, replicas: int) -> Outcome:
    """Forward, mean loss over the replicas' parts of the batch, backward.

    Args:
        case: tells the batch.
        model: the model on this rank.
        call: what is called in its place: the module, or its FlexModel.
        replicas: into how many parts the batch is cut over ranks; 1 where one process takes all.
    """
    tokens = case.data.tokens(case.dp).chunk(replicas)[model.dp_rank]
    model.module.zero_grad()
    embedded: list[Tensor] = []
    embedding = model.module.get_submodule(model.embedding)
    handle = embedding.register_forward_hook(lambda module, args, out: embedded.append(out))
    try:
        logits = model.logits(call, tokens[:, :-1])
    finally:
        handle.remove()
    embedded[0].retain_grad()
    _mean_loss(logits, tokens[:, 1:], case.dp // replicas).backward()
    if embedded[0].grad is None:
        raise RuntimeError(f"no gradient reached the embedding of {case.name}")
    return Outcome(logits.detach(), embedded[0].grad, model.weight_grads())


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

    The rank's own logits and input gradient are its part of the batch. The one process took the
    mean over replicas, so the rank's input gradient is that many times the other's. Records are due
    on the first rank alone.
    """
    dp, at = case.dp, model.dp_rank
    due_grad = expected.input_grad.chunk(dp, model.embedding_batch_dim)[at] * dp
    records = expected.records if dist.get_rank() == 0 else []
    return {
        "output": (relative_error(actual.logits, expected.logits.chunk(dp)[at]), ""),
        "input grad": (relative_error(actual.input_grad, model.embedding_part(due_grad)), ""),
        "weight grad": _worst(actual.weight_grads, expected.weight_grads),
        "trainable grad": _worst(actual.probe_grads, expected.probe_grads),
        "record": _worst(_numbered(actual.records), _numbered(records)),
    }


def _numbered(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"call {number}": tensor for number, tensor in enumerate(tensors)}


def _worst(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative error over named tensors; one that only one side has counts as inf."""
    errors = {
        name: relative_error(actual.get(name), expected.get(name))
        for name in sorted(actual.keys() | expected.keys())
    }
    name = max(errors, key=lambda name: errors[name], default="")
    return errors.get(name, 0.0), name
