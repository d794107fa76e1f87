"""Whether a state that is to be restored can be meant."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from flex_model.errors import ImportanceError, NothingCollectedError

__all__ = ["collected", "keys_of", "vector"]


def keys_of(state: Any, due: Collection[str], hook: str) -> None:
    """The keys of a state.

    Raises:
        ImportanceError: it is no mapping, or has other keys.
    """
    found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
    if found != sorted(due):
        raise ImportanceError(
            f"{hook}: a state with {found} was given, but {sorted(due)} is due. It is the state of "
            "another kind of hook."
        )


def vector(found: Any, size: int | None, what: str, hook: str) -> Tensor:
    """One number per channel.

    Raises:
        ImportanceError: no tensor, another length, or numbers that are none.
    """
    if not isinstance(found, Tensor) or found.ndim != 1:
        raise ImportanceError(f"{hook}: {what} must be a vector, got {_spelled(found)}.")
    if size is not None and found.numel() != size:
        raise ImportanceError(
            f"{hook}: {what} has {found.numel()} entries, but the layer has {size}. It is another "
            "layer's, or another model's."
        )
    if torch.isnan(found).any():
        raise ImportanceError(f"{hook}: {what} holds NaNs. Start from a state before they came.")
    return found.detach().clone()


def collected(total: Tensor | None, hook: str) -> Tensor:
    """A sum over calls.

    Raises:
        NothingCollectedError: there was none.
        ImportanceError: an activation was no number.
    """
    if total is None:
        raise NothingCollectedError(
            f"{hook}: no activations collected for importance estimation. Run the model first."
        )
    if torch.isnan(total).any():
        bad = int(torch.isnan(total).sum())
        raise ImportanceError(
            f"{hook}: {bad} of {total.numel()} scores are NaN, for an activation was. "
            "flex_model.importance.score names the batch."
        )
    return total


def _spelled(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"a tensor {tuple(found.shape)}"
    return type(found).__name__
