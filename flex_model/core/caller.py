"""Who calls a pipeline's stage: what torch's schedules do around it shows in their frames only."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineSchedule

__all__ = ["Caller", "caller", "raised_inside"]

_DRY = tuple(
    getattr(PipelineStage, name).__code__
    for name in ("_forward_metadata_inference", "_backward_metadata_inference")
    if hasattr(PipelineStage, name)
)
_REAL = PipelineStage.forward_one_chunk.__code__
_RUN = "_step_microbatches"


@dataclass(frozen=True)
class Caller:
    """A stage of torch's that calls the model, and its schedule.

    Attributes:
        dry: whether it only finds out what shapes it will send. The inputs then are made up (the
            first stage's are the first microbatch's, once more), so that nothing else tells.
        index: the stage's number.
        module: what the stage was given to call.
        divisor: what the schedule divides the gradients of that module's parameters by at its end.
    """

    dry: bool
    index: int
    module: nn.Module
    divisor: int


def caller() -> Caller | None:
    """The stage of torch's in whose call this runs; None in one of any other pipeline."""
    frame, stage, dry = sys._getframe(1), None, False
    while frame is not None:
        code = frame.f_code
        if stage is None and (code is _REAL or code in _DRY):
            stage, dry = frame.f_locals["self"], code in _DRY
        elif stage is not None and code.co_name == _RUN:
            return Caller(dry, stage.stage_index, stage.submod, _divisor(frame.f_locals["self"]))
        frame = frame.f_back  # type: ignore[assignment]
    return None if stage is None else Caller(dry, stage.stage_index, stage.submod, 1)


def raised_inside(error: Exception) -> Exception:
    """What a stage's forward or backward raised, which torch wraps to list what it was given."""
    inner = error.__cause__
    wrapped = type(error) is RuntimeError and "failed to run" in str(error).lower()
    return inner if wrapped and isinstance(inner, Exception) else error


def _divisor(schedule: Any) -> int:
    scales = isinstance(schedule, _PipelineSchedule) and schedule.scale_grads
    return schedule._n_microbatches if scales else 1
