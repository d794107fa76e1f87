"""Mixtures of experts: where tokens leave the order that they have on one process.

With experts shared out over ranks a layer sends each token to the ranks of the experts that it
chose, and takes what comes back. On either side every rank has its own tokens in their own order,
though no trace sees through the exchange. Between, an expert's tokens are as many as chose it, in
the order of the ranks that they came from: no cut of what one process has.

An expert with a capacity drops tokens, and each rank counts its own. Such a model computes
something else on many ranks than on one; hooks are exact for what it computes there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import nn

from flex_model.layouts import megatron, transformers
from flex_model.layouts.sources import Dispatch

__all__ = ["boundaries", "refused", "shares_experts"]


class Source(Protocol):
    """What a framework's file tells of its experts."""

    def dispatches(self, root: nn.Module) -> Iterator[Dispatch]:
        """Every place where tokens are sent to the ranks of their experts."""


_SOURCES: tuple[Source, ...] = (megatron, transformers)


def boundaries(root: nn.Module) -> frozenset[str]:
    """Paths of the modules whose first output lies as their first input does."""
    return frozenset(dispatch.boundary for dispatch in _dispatches(root))


def shares_experts(root: nn.Module) -> bool:
    """Whether any experts are shared out over ranks."""
    return any(dispatch.ranks > 1 for dispatch in _dispatches(root))


def refused(
    root: nn.Module, name: str, sizes: Mapping[str, int], *, parameter: bool = False
) -> str | None:
    """Why an activation (or parameter) is none that one process has, and what to hook instead.

    Args:
        root: the wrapped model.
        name: plain path of a module, or of a parameter.
        sizes: ranks by mesh dim.
        parameter: whether a parameter is meant.

    Returns:
        None where nothing is wrong with it. No hint can settle this: a gather in any order would
        give tokens that one process has in another.
    """
    for dispatch in _dispatches(root):
        if not dispatch.inside(name):
            continue
        if parameter:
            if dispatch.numbered_anew and dispatch.ranks > 1:
                return (
                    f"each of the {dispatch.ranks} expert-parallel ranks counts its experts from "
                    f"zero, so that this name means another expert's parameter on each."
                )
            continue
        batches = [f"{n}={sizes[n]}" for n in ("dp", "cp") if sizes.get(n, 1) > 1]
        if dispatch.ranks > 1 or batches:
            spread = ", ".join([f"ep={dispatch.ranks}", *batches])
            return (
                f"between the ranks of {dispatch.experts} ({spread}) an expert's tokens are as "
                "many as chose it and come in the order of ranks, not of the one process's "
                f"batch. Hook {dispatch.instead}."
            )
    return None


def _dispatches(root: nn.Module) -> Iterator[Dispatch]:
    for source in _SOURCES:
        yield from source.dispatches(root)
