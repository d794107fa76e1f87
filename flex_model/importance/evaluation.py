"""What zeroing the channels of the least scores does to one layer's output."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flex_model.errors import ImportanceError

__all__ = ["evaluate_importance_scores"]


@torch.no_grad()
def evaluate_importance_scores(
    linear_layer: nn.Module,
    activations_batches: Iterable[Tensor],
    importance_scores: Tensor,
    prune_ratio: float = 0.2,
) -> dict[str, float | int]:
    """Compare a layer's outputs with those without its least important input channels.

    Args:
        linear_layer: a linear layer; Megatron's ``(output, bias)`` counts by its output.
        activations_batches: its inputs, ``[.., channels]`` each.
        importance_scores: ``[channels]``, higher means keep.
        prune_ratio: of the channels, those of the ``int(channels * ratio)`` lowest scores go.

    Returns:
        ``rmse`` over all elements and ``cosine_similarity`` of the flattened outputs, averaged over
        batches, and ``num_pruned``.

    Raises:
        ImportanceError: no batches, a ratio outside [0, 1], or not one score per channel.
    """
    batches = list(activations_batches) if activations_batches is not None else []
    if not batches:
        raise ImportanceError("activations_batches must not be None or empty. Give some inputs.")
    if not 0.0 <= prune_ratio <= 1.0:
        raise ImportanceError(f"prune_ratio must be from 0 to 1, got {prune_ratio!r}.")
    channels = batches[0].shape[-1]
    if importance_scores.shape != (channels,):
        raise ImportanceError(
            f"importance_scores has shape {tuple(importance_scores.shape)}, but the layer has "
            f"{channels} input channels: give one score for each."
        )
    if torch.isnan(importance_scores).any():
        raise ImportanceError("importance_scores holds NaNs, which rank nowhere. Score again.")
    count = int(channels * prune_ratio)
    pruned = torch.topk(importance_scores, count, largest=False).indices
    pairs = [(_output(linear_layer, x), _output(linear_layer, _without(x, pruned)))
             for x in batches]  # fmt: skip
    errors = [F.mse_loss(after, before).sqrt() for before, after in pairs]
    cosines = [F.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in pairs]
    return {
        "rmse": torch.stack(errors).double().mean().item(),
        "cosine_similarity": torch.stack(cosines).double().mean().item(),
        "num_pruned": count,
    }


def _without(values: Tensor, pruned: Tensor) -> Tensor:
    return values.index_fill(-1, pruned.to(values.device), 0.0)


def _output(layer: nn.Module, values: Tensor) -> Tensor:
    found = layer(values)
    output: Tensor = found[0] if isinstance(found, tuple) else found
    return output.float()
