"""Taking entries along one dim of a tensor, the same of every row or others of each expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flex_model.pruning.dimensions import Axis

__all__ = ["as_row_numbers", "as_rows", "positions", "selected"]


def positions(axis: Axis, kept: Mapping[str, Tensor]) -> Tensor | None:
    """Which entries of a tensor dim stay.

    Args:
        axis: what the dim consists of.
        kept: the indexes that stay, by the space's name; others stay whole.

    Returns:
        ``[left]``, or ``[experts, left]`` where each expert keeps its own; None if all stay.
    """
    if not any(part.space is not None and part.space.name in kept for part in axis):
        return None
    found, start = [], 0
    for part in axis:
        index = kept.get(part.space.name) if part.space is not None else None
        if index is None or part.space is None:
            entries = torch.arange(part.length({}))
        else:
            entries = (index[..., None] * part.unit + torch.arange(part.unit)).flatten(-2)
        found.append(entries + start)
        start += part.length({})
    return torch.cat(found, -1)


def as_rows(
    tensor: Tensor, dim: int, by_expert: bool
) -> tuple[Tensor, Callable[[Tensor, int], Tensor]]:
    """A tensor with one dim in front, or with the experts (dim 0) times that dim.

    Returns:
        ``[entries, ...]``, and the way back for a tensor with as many entries as are said (of each
        expert, where it is by expert).
    """
    if not by_expert:
        return tensor.movedim(dim, 0), lambda rows, left: rows.movedim(0, dim).contiguous()
    experts = tensor.shape[0]
    rows = tensor.movedim(dim, 1).flatten(0, 1)
    return rows, lambda rows, left: rows.unflatten(0, (experts, left)).movedim(1, dim).contiguous()


def as_row_numbers(index: Tensor, length: int) -> Tensor:
    """Positions along a dim of this length as numbers of `as_rows`' entries: ``[n]``."""
    if index.ndim == 1:
        return index
    return (torch.arange(len(index))[:, None] * length + index).flatten()


def selected(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """The entries at ``index`` along one dim, in a tensor of its own.

    Args:
        tensor: whole.
        dim: where the entries lie.
        index: ``[left]``, or ``[experts, left]`` where dim 0 is the experts.
    """
    rows, back = as_rows(tensor, dim, index.ndim == 2)
    numbers = as_row_numbers(index, tensor.shape[dim])
    return back(rows.index_select(0, numbers.to(tensor.device)), index.shape[-1])
