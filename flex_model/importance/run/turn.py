"""What ranks tell each other before each batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields

from torch import Tensor

from flex_model.distributed.mesh import ParallelMesh
from flex_model.errors import ImportanceError
from flex_model.importance.activation import PaddingMask

__all__ = ["Turn", "all_or_none", "whole_mask"]


@dataclass(frozen=True)
class Turn:
    """One rank's word, in few integers.

    Attributes:
        more: whether it has a batch.
        masked: whether the batch tells its padding.
        real: if so, its tokens that count, and
        tokens: all of them.
        sick: the first hook whose statistics of the batch before were not finite; -1 if all were.
        due: whether a checkpoint is due; the first rank's word counts.
    """

    more: int
    masked: int
    real: int
    tokens: int
    sick: int
    due: int

    @property
    def encoded(self) -> Sequence[int]:
        """As it is sent."""
        return [int(number) for number in astuple(self)]

    @classmethod
    def width(cls) -> int:
        """How many integers it takes."""
        return len(fields(cls))


def all_or_none(told: Mapping[int, Turn], batch: int) -> bool:
    """Whether there is another batch.

    Raises:
        ImportanceError: some ranks have one.
    """
    without = [rank for rank, turn in told.items() if not turn.more]
    if without and len(without) < len(told):
        raise ImportanceError(
            f"Rank(s) {without} have no batch {batch}, the others have. Give every rank as many; "
            "the last ones may be smaller."
        )
    return not without


def whole_mask(
    told: Mapping[int, Turn], own: Tensor | None, mesh: ParallelMesh
) -> PaddingMask | None:
    """This rank's mask, ``[batch, sequence]``, with the real tokens of the whole batch; None if all
    of them are.

    Raises:
        ImportanceError: some ranks have none.
    """
    without = [rank for rank, turn in told.items() if not turn.masked]
    if own is None and len(without) == len(told):
        return None
    if own is None or without:
        raise ImportanceError(
            f"Rank(s) {without} have no attention_mask, the others have. Give it on every rank."
        )
    # Tensor-parallel ranks have the same tokens.
    turns = [turn for rank, turn in told.items() if mesh.coordinate_of(rank, "tp") == 0]
    real = sum(turn.real for turn in turns)
    return PaddingMask(own, real) if real < sum(turn.tokens for turn in turns) else None
