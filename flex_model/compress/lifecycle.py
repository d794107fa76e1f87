"""Drives the modifiers of one run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from flex_model.compress.event import BATCH_ORDER, Event, EventType
from flex_model.compress.modifier import Modifier
from flex_model.compress.state import State
from flex_model.errors import CompressionError, ModifierStateError

__all__ = ["Lifecycle"]


class Lifecycle:
    """Several modifiers, from the first batch to the last.

    The loop tells what happens, on every rank alike: `initialize`, `event`, `finalize`. Steps are
    counted from batch to batch: events of the n-th batch carry step n - 1, its BATCH_END carries n,
    the number of batches done. A loop that counts otherwise tells its own ``global_step``.

    Where a callback raises, every modifier is undone and all hooks are off before the error is
    passed on; `initialize` may then be called again.

    Args:
        modifiers: in the order in which they hear of events.
        steps_per_epoch: makes ``start``, ``end`` and ``update`` of modifiers epochs.

    Attributes:
        state: what the modifiers work on.
        modifiers: the modifiers.
        initialized: whether the run has begun.
        finalized: whether it is over.
        last_event: the last event of a batch.
        global_step: of the last event.

    Examples:
        >>> lifecycle = Lifecycle(modifiers_of(recipe))
        >>> lifecycle.initialize(model=model)
        >>> for batch in batches:
        ...     lifecycle.event("batch_start", batch_data=batch)
        ...     model(batch)
        ...     lifecycle.event("batch_end")
        >>> lifecycle.finalize()
    """

    def __init__(
        self, modifiers: Iterable[Modifier] = (), *, steps_per_epoch: int | None = None
    ) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._set_up(modifiers)

    def _set_up(self, modifiers: Iterable[Modifier]) -> None:
        self.state = State()
        self.modifiers = _distinct(modifiers)
        self.initialized = self.finalized = False
        self.last_event = EventType.BATCH_END
        self.global_step = 0
        self._batches = 0
        self._calibrating = False

    def initialize(
        self, modifiers: Iterable[Modifier] | None = None, **state: Any
    ) -> list[Any] | None:
        """Begin: all modifiers are initialized, or none is.

        Args:
            modifiers: in place of those there are.
            **state: fields of the `State`.

        Returns:
            What modifiers returned, if anything; None if the run has begun already.

        Raises:
            CompressionError: a modifier is listed twice, or cannot be initialized.
            ModifierStateError: a modifier was used before.
        """
        if self.initialized:
            return None
        self.state.update(**state)
        if modifiers is not None:
            self.modifiers = _distinct(modifiers)
        done: list[Modifier] = []
        try:
            for modifier in self.modifiers:
                modifier.initialize(self.state)
                done.append(modifier)
        except Exception:
            self._undo(done)
            raise
        self.initialized = True
        return []

    def event(
        self,
        event_type: EventType | str,
        *,
        batch_data: Any = None,
        loss: Any = None,
        global_step: int | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Tell every modifier what happens.

        Args:
            event_type: what; INITIALIZE and FINALIZE have methods of their own.
            batch_data: the batch, for modifiers.
            loss: needed for LOSS_CALCULATED.
            global_step: steps so far, where the loop counts otherwise.
            **kwargs: for the modifiers' callbacks.

        Raises:
            CompressionError: the run has not begun or is over, events come in a wrong order (then
                nothing is changed), or a callback raised (then every modifier is undone).
            ModifierStateError: a modifier could not be initialized.
        """
        kind = self._checked(event_type, loss)
        self._count(kind, global_step)
        self.state.update(batch_data=batch_data, loss=loss)
        event = Event(
            type_=kind, steps_per_epoch=self._steps_per_epoch, global_step=self.global_step,
            global_batch=self._batches,
        )  # fmt: skip
        try:
            for modifier in self.modifiers:
                modifier.update_event(self.state, event, batch_data=batch_data, loss=loss, **kwargs)
        except ModifierStateError:
            raise
        except Exception:
            self.initialized, self.last_event = False, EventType.BATCH_END
            self._calibrating = False
            self._undo(self.modifiers)
            raise
        return []

    def finalize(self, **kwargs: Any) -> list[Any]:
        """End: every modifier is finalized and its hooks are off, whatever the others do.

        Raises:
            CompressionError: the run has not begun, is over, or a modifier raised.
            ModifierStateError: a modifier could not be initialized.
        """
        if not self.initialized:
            raise CompressionError("Cannot finalize before initializing.")
        if self.finalized:
            raise CompressionError("Cannot finalize more than once.")
        self._finalize_all(**kwargs)
        self.finalized = True
        return []

    def reset(self) -> None:
        """End what is under way, and begin anew without modifiers."""
        try:
            self._finalize_all(only_initialized=True)
        finally:
            self._set_up(())

    @contextmanager
    def disable_hooks(self) -> Iterator[None]:
        """Pass over every modifier's hooks while inside. It nests."""
        with ExitStack() as stack:
            for modifier in self.modifiers:
                stack.enter_context(modifier.disable_hooks())
            yield

    def _finalize_all(self, *, only_initialized: bool = False, **kwargs: Any) -> None:
        failed: list[Exception] = []
        for modifier in self.modifiers:
            if modifier.finalized or (only_initialized and not modifier.initialized):
                continue
            try:
                modifier.finalize(self.state, **kwargs)
            except Exception as error:  # noqa: BLE001  (the others' hooks must go too)
                failed.append(error)
        if failed:
            raise failed[0]

    def _undo(self, modifiers: Iterable[Modifier]) -> None:
        """The last first; one that raises keeps none of the others from it."""
        failed: dict[str, Exception] = {}
        for modifier in reversed([*modifiers]):
            try:
                modifier.undo(self.state)
            except Exception as error:  # noqa: BLE001, PERF203  (the others must be undone too)
                failed[type(modifier).__name__] = error
        for who, why in failed.items():
            raise CompressionError(
                f"{who} could not be undone ({why!r}): what it changed of the model is left. All "
                "hooks are off."
            ) from why

    def _checked(self, event_type: EventType | str, loss: Any) -> EventType:
        """An event that may come now."""
        try:
            kind = EventType(event_type)
        except ValueError as error:
            known = [one.value for one in EventType]
            raise CompressionError(f"No event {event_type!r}; there are {known}.") from error
        if kind in (EventType.INITIALIZE, EventType.FINALIZE):
            raise CompressionError(
                f"Cannot invoke the event {kind.value}. Use the method of that name instead."
            )
        if not self.initialized:
            raise CompressionError(f"Cannot invoke {kind.value} before initializing.")
        if self.finalized:
            raise CompressionError(f"Cannot invoke {kind.value} after finalizing.")
        if kind in BATCH_ORDER:
            self._check_order(kind)
        else:
            self._check_calibration(kind)
        if kind is EventType.LOSS_CALCULATED and loss is None:
            raise CompressionError("Loss must be provided for loss_calculated.")
        return kind

    def _check_order(self, kind: EventType) -> None:
        last = self.last_event
        if kind is EventType.BATCH_START:
            fits = last is EventType.BATCH_END
        else:
            fits = BATCH_ORDER.index(last) <= BATCH_ORDER.index(kind)
        if not fits:
            order = " < ".join(one.value for one in BATCH_ORDER)
            raise CompressionError(
                f"{kind.value} came after {last.value}, but the order in a batch is {order}."
            )

    def _check_calibration(self, kind: EventType) -> None:
        begins = kind is EventType.CALIBRATION_EPOCH_START
        if begins == self._calibrating:
            first, then = EventType.CALIBRATION_EPOCH_START, EventType.CALIBRATION_EPOCH_END
            raise CompressionError(
                f"{kind.value} came {'during' if begins else 'outside'} a calibration, which goes "
                f"from {first.value} to {then.value}."
            )

    def _count(self, kind: EventType, global_step: int | None) -> None:
        """Note an event that may come, and the step that it belongs to."""
        ends_batch = kind is EventType.BATCH_END and self.last_event is not EventType.BATCH_END
        self._batches += ends_batch
        self.global_step = self.global_step + ends_batch if global_step is None else global_step
        if kind in BATCH_ORDER:
            self.last_event = kind
        elif kind is not EventType.SEQUENTIAL_EPOCH_END:
            self._calibrating = kind is EventType.CALIBRATION_EPOCH_START


def _distinct(modifiers: Iterable[Modifier]) -> list[Modifier]:
    found = [*modifiers]
    if len({id(modifier) for modifier in found}) != len(found):
        raise CompressionError("A modifier is listed twice. Make another one for each place.")
    return found
