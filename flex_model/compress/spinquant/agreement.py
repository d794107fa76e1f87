"""Ranks that will exchange weights go the same way: what one of them refuses all refuse."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch import nn

from flex_model.compress.spinquant.sharded import local_of
from flex_model.distributed.collectives import exchanged
from flex_model.distributed.communicator import Communicator
from flex_model.errors import CompressionError, RankDisagreementError
from flex_model.layouts.resolve import groups_of

__all__ = ["agreed"]

T = TypeVar("T")


def agreed(model: nn.Module, attempt: Callable[[], T], spelled: Callable[[T], str]) -> T:
    """What an attempt returns, once it has succeeded alike on every rank that holds the model.

    Args:
        model: on this rank. Of one process that holds it whole, nothing is asked of others.
        attempt: is called once, and changes nothing.
        spelled: its result as text, the same on every rank.

    Raises:
        CompressionError: it failed on another rank; here it raises what it raised.
        RankDisagreementError: the ranks have different results.
    """
    groups = groups_of(model) if dist.is_available() and dist.is_initialized() else {}
    error: Exception | None = None
    told = 0
    try:
        result = attempt()
        told = zlib.crc32(spelled(result).encode())
    except Exception as raised:  # noqa: BLE001 - raised again below, when the others know
        error = raised
    device = local_of(next(model.parameters())).device
    failed, differ = error is not None, False
    for group in groups.values():
        rows = exchanged([failed, differ, told], device, Communicator(group))
        failed = any(row[0] for row in rows)
        differ = any(row[1] for row in rows) or len({row[2] for row in rows}) > 1
    if error is not None:
        raise error
    if failed:
        raise CompressionError("Another rank refused (its error says why), so all ranks do.")
    if differ:
        raise RankDisagreementError(
            "Ranks ask for different rotations. Give the same arguments and matrices on each."
        )
    return result
