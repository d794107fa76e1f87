"""What happens in a training or calibration loop, and when."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from enum import Enum
from typing import Any

from flex_model.errors import CompressionError

__all__ = ["BATCH_ORDER", "Event", "EventType"]

_NEAR_ZERO = 1e-10
_OTHER_NAMES = {"calibration_start": "calibration_epoch_start"}
_OTHER_NAMES |= {"calibration_end": "calibration_epoch_end"}


class EventType(Enum):
    """What a loop tells. llmcompressor's later values ``"calibration_start"`` and
    ``"calibration_end"`` are taken too.
    """

    INITIALIZE = "initialize"
    FINALIZE = "finalize"
    BATCH_START = "batch_start"
    LOSS_CALCULATED = "loss_calculated"
    BATCH_END = "batch_end"
    CALIBRATION_EPOCH_START = "calibration_epoch_start"
    SEQUENTIAL_EPOCH_END = "sequential_epoch_end"
    CALIBRATION_EPOCH_END = "calibration_epoch_end"
    OPTIM_PRE_STEP = "optim_pre_step"
    OPTIM_POST_STEP = "optim_post_step"

    @classmethod
    def _missing_(cls, value: object) -> EventType | None:
        other = _OTHER_NAMES.get(value) if isinstance(value, str) else None
        return cls(other) if other else None


BATCH_ORDER = (
    EventType.BATCH_START,
    EventType.LOSS_CALCULATED,
    EventType.OPTIM_PRE_STEP,
    EventType.OPTIM_POST_STEP,
    EventType.BATCH_END,
)


@dataclass
class Event:
    """One event, and where in the run it happens: in steps, or in epochs if their length is known.

    Attributes:
        type_: what happens.
        steps_per_epoch: None counts in steps.
        batches_per_step: with gradient accumulation; None (or 0) for one.
        global_step: steps so far.
        global_batch: batches so far.
    """

    type_: EventType | None = None
    steps_per_epoch: int | None = None
    batches_per_step: int | None = None
    global_step: int = 0
    global_batch: int = 0

    @property
    def epoch_based(self) -> bool:
        """Whether the length of an epoch is known."""
        return self.steps_per_epoch is not None

    @property
    def epoch(self) -> int:
        """Whole epochs so far."""
        return self.global_step // self._epoch_length()

    @property
    def epoch_full(self) -> float:
        """Epochs so far, with the fraction of the one under way."""
        return self.global_step / self._epoch_length()

    @property
    def epoch_step(self) -> int:
        """Steps so far in this epoch."""
        return self.global_step % self._epoch_length()

    @property
    def epoch_batch(self) -> int:
        """Batches so far in this epoch."""
        return self.global_batch % (self._epoch_length() * (self.batches_per_step or 1))

    @property
    def current_index(self) -> float:
        """Where a modifier's ``start`` and ``end`` are: in epochs if their length is known."""
        return self.epoch_full if self.epoch_based else self.global_step

    @current_index.setter
    def current_index(self, index: float) -> None:
        self.global_step = int(index * self.steps_per_epoch) if self.steps_per_epoch else int(index)
        per_step = self.batches_per_step or 1
        self.global_batch = self.global_step * max(1, per_step)

    def should_update(self, start: float | None, end: float | None, update: float | None) -> bool:
        """Whether what runs from ``start`` to ``end``, every ``update``, is due now.

        The remainder of ``index % update`` is taken in floats, as llmcompressor does: 0.3 of an
        epoch is no multiple of 0.1. Count in steps, or by fractions that floats hold exactly (0.5,
        0.25).
        """
        index = self.current_index
        if (start is not None and index < start) or (end is not None and index > end):
            return False
        return update is None or update <= 0 or index % update < _NEAR_ZERO

    def new_instance(self, **changes: Any) -> Event:
        """A copy with other fields, ``current_index`` among them.

        Raises:
            CompressionError: no such field.
        """
        fields = {*self.__dataclass_fields__, "current_index"}
        if not {*changes} <= fields:
            raise CompressionError(f"An Event has no {sorted({*changes} - fields)}.")
        other = copy(self)
        for name, value in changes.items():
            setattr(other, name, value)
        return other

    def _epoch_length(self) -> int:
        if self.steps_per_epoch is None:
            raise CompressionError("Event is not epoch based: give it steps_per_epoch.")
        return self.steps_per_epoch
