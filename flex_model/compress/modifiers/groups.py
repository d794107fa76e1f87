"""Switches a FlexModel's hook groups."""

from __future__ import annotations

from typing import Any

from pydantic import PrivateAttr

from flex_model.compress.event import Event, EventType
from flex_model.compress.modifier import Modifier
from flex_model.compress.state import State
from flex_model.core.flex_model import FlexModel
from flex_model.errors import CompressionError

__all__ = ["GroupsModifier"]


class GroupsModifier(Modifier):
    """Hook groups of the FlexModel are on from ``start`` to ``end``, and off before and after.

    With ``update`` they are on only in steps for which `Event.should_update` holds. When the run is
    over they are on again, as without a recipe.

    Attributes:
        groups: names of the groups; they must exist when the run begins.
    """

    groups: list[str]

    _model: FlexModel | None = PrivateAttr(default=None)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        if not isinstance(state.model, FlexModel):
            raise CompressionError(
                "GroupsModifier needs a FlexModel, whose hook groups it switches."
            )
        for group in self.groups:
            state.model.get_group_hook_functions(group)
        self._model = state.model
        self._switch_groups(False)
        return True

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        self._switch_groups(event.should_update(self.start, self.end, self.update))

    def on_update(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ is EventType.BATCH_START:
            self._switch_groups(event.should_update(self.start, self.end, self.update))

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._switch_groups(False)

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        self._switch_groups(True)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._switch_groups(False)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        self._switch_groups(True)
        return True

    def on_undo(self, state: State) -> None:
        self._switch_groups(True)

    def _switch_groups(self, on: bool) -> None:
        if self._model is not None:
            self._model.switch_hook_groups(self.groups, on)
