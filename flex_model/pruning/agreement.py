"""Ranks go the same way: what one of them refuses all refuse, and all do the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from flex_model.distributed.collectives import exchanged
from flex_model.distributed.communicator import Communicator
from flex_model.errors import PruningError, RankDisagreementError
from flex_model.pruning.sharded import ranks_of

__all__ = ["agreed"]

T = TypeVar("T")


def agreed(model: nn.Module, attempt: Callable[[], T], spelled: Callable[[T], str]) -> T:
    """What an attempt returns, once it has succeeded alike on every rank that holds the model.

    Args:
        model: on this rank.
        attempt: is called once, and changes nothing that would have to be taken back.
        spelled: its result as text, which must be the same on every rank.

    Raises:
        PruningError: it failed on another rank; here it raises what it raised.
        RankDisagreementError: the ranks have different results.
    """
    group = ranks_of(model) if isinstance(model, nn.Module) else None
    if group is None:
        return attempt()
    ranks, device = Communicator(group), _device(model)
    error: Exception | None = None
    try:
        result = attempt()
        told = spelled(result)
    except Exception as raised:  # noqa: BLE001 - raised again below, when the others know
        error, told = raised, str(raised)
    number = int.from_bytes(hashlib.blake2b(told.encode(), digest_size=7).digest(), "big")
    rows = exchanged([error is not None, number, len(told.encode())], device, ranks)
    failed = [rank for rank, row in zip(ranks.ranks, rows, strict=True) if row[0]]
    if failed:
        texts = _exchanged_texts(told, max(row[2] for row in rows), device, ranks)
        if error is not None:
            raise error
        message = texts[ranks.ranks.index(failed[0])]
        raise PruningError(f"Rank {failed[0]} refused, so all ranks do: {message}")
    if len({row[1] for row in rows}) > 1:
        raise RankDisagreementError(
            "Ranks disagree on what is left of the model. Give the same model, scores and targets "
            "on every rank."
        )
    return result


def _exchanged_texts(
    text: str, longest: int, device: torch.device, ranks: Communicator
) -> Sequence[str]:
    own = list(text.encode().ljust(longest, b"\0"))
    return [bytes(row).rstrip(b"\0").decode() for row in exchanged(own, device, ranks)]


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters())
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).device
