"""What pruning costs: perplexity before, after, and after cutting as much at random."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flex_model.errors import PruningError
from flex_model.pruning.cut import pruned
from flex_model.pruning.prune import plan_alike
from flex_model.pruning.scores import Scores, random_scores
from flex_model.pruning.target import Target, Targets

__all__ = ["Comparison", "Measured", "compare", "perplexity"]


# Of which the exponential is a float.
_LARGEST = 700.0


@dataclass(frozen=True)
class Measured:
    """One model: how many parameters it has, and its perplexity."""

    name: str
    parameters: int
    perplexity: float


@dataclass(frozen=True)
class Comparison:
    """The model before pruning, after it, and after pruning as much by random scores."""

    before: Measured
    after: Measured
    random: Measured


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """``exp`` of the mean cross-entropy of each next token.

    Args:
        model: a causal language model, whole or sharded; every rank gives the same batches.
        batches: token ids, each ``[batch, sequence]`` without padding, on any device. All tokens
            but each sequence's first are predicted, and count alike.

    Raises:
        PruningError: nothing is predicted, or a batch is no such tensor.
    """
    total, count = 0.0, 0
    training, device = model.training, _device_of_inputs(model)
    model.eval()
    try:
        for batch in batches:
            _check_batch(batch)
            ids = batch.to(device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            targets = ids[:, 1:]
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            total, count = total + loss.item(), count + targets.numel()
    finally:
        model.train(training)
    if count == 0:
        raise PruningError("There is nothing to predict: give at least one batch of token ids.")
    return math.exp(min(total / count, _LARGEST))


def compare(
    model: nn.Module,
    scores: Scores,
    batches: Sequence[Tensor],
    *,
    seed: int = 0,
    ffn: Target | None = None,
    kv_heads: Target | None = None,
    hidden: Target | None = None,
    layers: Target | None = None,
    experts: Target | None = None,
) -> Comparison:
    """Perplexity before, after and at random, on the same tokens. Leaves the model as it was.

    Args:
        model: as for `prune`. The pruned weights are held beside it for as long as they are used.
        scores: as for `prune`.
        batches: as for `perplexity`.
        seed: of the random scores.
        ffn: as for `prune`, and so are the other dimensions.
        kv_heads: see there.
        hidden: see there.
        layers: see there.
        experts: see there.

    Raises:
        PruningError: as for `prune` and `perplexity`.
    """
    targets = Targets(ffn=ffn, kv_heads=kv_heads, hidden=hidden, layers=layers, experts=experts)
    batches = list(batches)
    plan = plan_alike(model, scores, targets)
    found = [Measured("before", plan.parameters_before, perplexity(model, batches))]
    at_random = plan_alike(model, random_scores(model, seed), targets)
    for name, chosen in (("after", plan), ("random", at_random)):
        with pruned(model, chosen):
            found.append(Measured(name, chosen.parameters_after, perplexity(model, batches)))
    return Comparison(*found)


def _check_batch(batch: Tensor) -> None:
    whole = isinstance(batch, Tensor) and not batch.is_floating_point() and batch.ndim == 2
    if not whole or batch.shape[1] < 2:
        told = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        raise PruningError(
            f"A batch is a tensor of token ids, [batch, sequence] of two or more, got {told}."
        )


def _device_of_inputs(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
