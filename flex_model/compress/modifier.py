"""What changes a model (or looks at it) while a loop runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from pydantic import PrivateAttr

from flex_model.compress.event import Event, EventType
from flex_model.compress.hooks_mixin import HooksMixin
from flex_model.compress.state import State
from flex_model.errors import CompressionError, ModifierStateError

__all__ = ["Modifier", "ModifierInterface"]


class ModifierInterface(ABC):
    """What a `Lifecycle` needs of a modifier."""

    @property
    @abstractmethod
    def initialized(self) -> bool:
        """Whether it has been initialized."""

    @property
    @abstractmethod
    def finalized(self) -> bool:
        """Whether it has been finalized."""

    @abstractmethod
    def initialize(self, state: State, **kwargs: Any) -> None:
        """Get ready."""

    @abstractmethod
    def finalize(self, state: State, **kwargs: Any) -> None:
        """Leave the model with what was done to it, and without hooks."""

    @abstractmethod
    def update_event(self, state: State, event: Event, **kwargs: Any) -> None:
        """Hear of an event."""

    @abstractmethod
    def undo(self, state: State) -> None:
        """Leave the model as it was before `initialize`, which may be called again."""


class Modifier(ModifierInterface, HooksMixin):
    """Changes a model between two points of a run: fill in the callbacks.

    A pydantic model: its fields are what a recipe tells, and unknown ones are refused.

    Attributes:
        index: place in the recipe.
        group: name of the part of the recipe that it belongs to.
        start: when to begin, in steps, or in epochs if their length is known. None: never by
            itself, only with a calibration.
        end: when to stop: this step (or epoch) is the first without it. None: never by itself.
        update: how often `on_update` has something to do, for those who ask `Event.should_update`.
    """

    index: int | None = None
    group: str | None = None
    start: float | None = None
    end: float | None = None
    update: float | None = None

    _initialized: bool = PrivateAttr(default=False)
    _finalized: bool = PrivateAttr(default=False)
    _started: bool = PrivateAttr(default=False)
    _ended: bool = PrivateAttr(default=False)
    _calibrated: bool = PrivateAttr(default=False)

    # -- to be filled in -----------------------------------------------------------------------

    @abstractmethod
    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Get ready; False if it cannot be."""

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """``start`` has come."""

    def on_update(self, state: State, event: Event, **kwargs: Any) -> None:
        """Something happened between ``start`` and ``end``."""

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """``end`` has come."""

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        """Anything happened, whether started or not."""

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """A calibration begins."""

    def on_sequential_epoch_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """A part of the model has seen all calibration data."""

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """A calibration has ended."""

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Finish; False if it cannot be. Hooks are taken off afterwards."""
        return True

    def on_undo(self, state: State) -> None:
        """Put back what callbacks changed of the model, as far as they came. Hooks are taken off
        already.
        """

    # -- where it stands -----------------------------------------------------------------------

    @property
    def initialized(self) -> bool:
        return self._initialized

    @property
    def finalized(self) -> bool:
        return self._finalized

    @property
    def started(self) -> bool:
        """Whether it has begun, by ``start`` or with a calibration."""
        return self._started

    @property
    def ended(self) -> bool:
        """Whether it has stopped."""
        return self._ended

    def should_start(self, event: Event) -> bool:
        """Whether an event lies between ``start`` and ``end``."""
        index = event.current_index
        if self.start is None or index < self.start:
            return False
        return self.end is None or index < self.end

    def should_end(self, event: Event) -> bool:
        """Whether an event lies at ``end`` or behind it."""
        return self.end is not None and event.current_index >= self.end

    # -- what a lifecycle calls ----------------------------------------------------------------

    def initialize(self, state: State, **kwargs: Any) -> None:
        """Get ready, and begin if ``start`` is the very beginning.

        Raises:
            ModifierStateError: it was used already.
            CompressionError: a callback raised; then it is undone.
        """
        if self._initialized or self._finalized:
            raise ModifierStateError(
                f"Cannot initialize a modifier that has already been initialized or finalized "
                f"({self._who}). Make another one."
            )
        event = Event(type_=EventType.BATCH_START)
        try:
            self._initialized = self._call(self.on_initialize, state, **kwargs) is not False
            if self._initialized and self.should_start(event):
                self._call(self.on_start, state, event, **kwargs)
                self._started = True
        except Exception:
            self.undo(state)
            raise

    def finalize(self, state: State, **kwargs: Any) -> None:
        """Finish, and take every hook off, whatever happens.

        Raises:
            ModifierStateError: it is not initialized, or finalized already.
            CompressionError: `on_finalize` raised.
        """
        if self._finalized:
            raise ModifierStateError(f"Cannot finalize a modifier more than once ({self._who}).")
        if not self._initialized:
            raise ModifierStateError(f"Cannot finalize an uninitialized modifier ({self._who}).")
        try:
            self._finalized = self._call(self.on_finalize, state, **kwargs) is not False
        finally:
            self.remove_hooks()

    def update_event(self, state: State, event: Event, **kwargs: Any) -> None:
        """Call what an event is for.

        Raises:
            ModifierStateError: it is not initialized, or finalized already.
            CompressionError: a callback raised.
        """
        if not self._initialized:
            raise ModifierStateError(f"Cannot update an uninitialized modifier ({self._who}).")
        if self._finalized:
            raise ModifierStateError(f"Cannot update a finalized modifier ({self._who}).")

        def call(callback: Callable[..., Any]) -> None:
            self._call(callback, state, event, **kwargs)

        call(self.on_event)
        running = self._started and not self._ended
        if event.type_ is EventType.CALIBRATION_EPOCH_START:
            if not self._calibrated:  # a second one must not transform weights again
                call(self.on_calibration_start)
                self._started = self._calibrated = True
        elif event.type_ is EventType.SEQUENTIAL_EPOCH_END:
            call(self.on_sequential_epoch_end)
        elif event.type_ is EventType.CALIBRATION_EPOCH_END:
            if not self._ended:
                call(self.on_calibration_end)
                self._ended = True
        else:
            self._run(event, call, running)

    def _run(self, event: Event, call: Callable[..., None], running: bool) -> None:
        """Start, update and end within a loop of batches."""
        if event.type_ is EventType.BATCH_START and not self._started:
            if self.should_start(event):
                call(self.on_start)
                self._started = True
                call(self.on_update)
        elif event.type_ is EventType.BATCH_END and not self._ended and self.should_end(event):
            call(self.on_end)
            self._ended = True
            call(self.on_update)
        elif running:
            call(self.on_update)

    def undo(self, state: State) -> None:
        self.remove_hooks()
        try:
            self.on_undo(state)
        finally:
            self._initialized = self._finalized = self._calibrated = False
            self._started = self._ended = False

    @property
    def _who(self) -> str:
        return type(self).__name__ if self.index is None else f"{type(self).__name__} {self.index}"

    def _call(
        self, callback: Callable[..., Any], state: State, *event: Event, **kwargs: Any
    ) -> Any:
        """A callback, whose errors tell whose they are and when they came."""
        try:
            return callback(state, *event, **kwargs)
        except Exception as error:
            when = ""
            if event and event[0].type_ is not None:
                when = f" at {event[0].type_.value}, step {event[0].global_step}"
            raise CompressionError(
                f"{self._who}.{callback.__name__}{when} raised {type(error).__name__}: {error}"
            ) from error
