"""What a batch is: how a model is called with it, which of its tokens count, and its digest."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from flex_model.errors import ImportanceError

__all__ = ["call", "checked", "device_of", "digest", "padding", "to_device"]


def checked(batch: Any) -> Any:
    """A batch that `call` can run.

    Raises:
        ImportanceError: it is something else.
    """
    if not isinstance(batch, (Tensor, Mapping, tuple, list)):
        raise ImportanceError(
            "A batch is a tensor, a mapping of keywords or a tuple of arguments, got "
            f"{type(batch).__name__}."
        )
    return batch


def call(model: nn.Module, batch: Any) -> None:
    """Run a model on a tensor, on a mapping by keyword, or on a tuple's values."""
    if isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    else:
        model(*batch)


def padding(batch: Any) -> Tensor | None:
    """Which tokens are real, ``[batch, sequence]``, bool; None where the batch does not tell."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def device_of(model: nn.Module) -> torch.device | None:
    """Where a model takes its inputs; None where nothing tells."""
    return next((p.device for p in model.parameters() if not p.is_meta), None)


def to_device(batch: Any, device: torch.device | None) -> Any:
    """The batch with its tensors on a device."""
    if device is None:
        return batch

    def moved(leaf: Any) -> Any:
        return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    if isinstance(batch, Mapping):  # of any class
        return {name: tree_map(moved, value) for name, value in batch.items()}
    return tree_map(moved, batch)


def digest(batch: Any, before: int = 0) -> int:
    """A checksum of the tensors of all batches so far."""
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            before = zlib.crc32(f"{leaf.dtype}{tuple(leaf.shape)}".encode(), before)
            plain = leaf.detach().cpu().contiguous().flatten().view(torch.uint8)
            before = zlib.crc32(plain.numpy().data, before)
    return before
