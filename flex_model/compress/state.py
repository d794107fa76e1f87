"""What modifiers work on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn
from torch.optim import Optimizer

from flex_model.errors import CompressionError

__all__ = ["Data", "Hardware", "State"]


@dataclass
class Data:
    """The data sets of a run, as the caller has them."""

    train: Any = None
    val: Any = None
    test: Any = None
    calib: Any = None


@dataclass
class Hardware:
    """Where a run takes place, as the caller tells it."""

    device: Any = None
    rank: int | None = None
    world_size: int | None = None


@dataclass
class State:
    """What modifiers work on, filled in by whoever runs the loop.

    Attributes:
        model: the model, or the FlexModel around it.
        teacher_model: for distillation.
        optimizer: of the training loop.
        optim_wrapped: whether the optimizer tells of its steps itself.
        loss: the last one told.
        batch_data: the last batch told.
        data: the data sets.
        hardware: where it runs.
        loggers: whoever is to be told.
        model_log_cadence: how often, in the units of `Event.current_index`.
    """

    model: nn.Module | None = None
    teacher_model: nn.Module | None = None
    optimizer: Optimizer | None = None
    optim_wrapped: bool = False
    loss: Any = None
    batch_data: Any = None
    data: Data = field(default_factory=Data)
    hardware: Hardware = field(default_factory=Hardware)
    loggers: Callable[..., Any] | Any = None
    model_log_cadence: float | None = None

    @property
    def compression_ready(self) -> bool:
        """Whether there are a model and an optimizer."""
        return self.model is not None and self.optimizer is not None

    def update(self, **changes: Any) -> None:
        """Set fields. ``train_data``, ``val_data``, ``test_data``, ``calib_data`` and ``device``
        are set where they belong. None leaves a field as it is.

        Raises:
            CompressionError: no such field; then none is set.
        """
        inner: dict[str, tuple[object, str]]
        inner = {f"{name.name}_data": (self.data, name.name) for name in fields(Data)}
        inner |= {name.name: (self.hardware, name.name) for name in fields(Hardware)}
        own = {name.name for name in fields(self)}
        unknown = sorted({*changes} - own - {*inner})
        if unknown:
            raise CompressionError(f"The State has no {unknown}; it has {sorted(own | {*inner})}.")
        for name, value in changes.items():
            if value is not None:
                holder, own_name = inner.get(name, (self, name))
                setattr(holder, own_name, value)
