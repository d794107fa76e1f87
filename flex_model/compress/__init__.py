"""Recipes that change a model while it trains or is calibrated: events, modifiers, their lifecycle.

There is no session and nothing is global: a `Lifecycle` is an object that the loop holds.
"""

from flex_model.compress.event import Event, EventType
from flex_model.compress.hooks_mixin import HooksMixin
from flex_model.compress.lifecycle import Lifecycle
from flex_model.compress.modifier import Modifier, ModifierInterface
from flex_model.compress.modifiers import GroupsModifier, ScoreModifier, SparsifyModifier
from flex_model.compress.recipe import modifiers_of
from flex_model.compress.spinquant.modifier import SpinQuantModifier
from flex_model.compress.state import State

__all__ = [
    "Event",
    "EventType",
    "GroupsModifier",
    "HooksMixin",
    "Lifecycle",
    "Modifier",
    "ModifierInterface",
    "ScoreModifier",
    "SparsifyModifier",
    "SpinQuantModifier",
    "State",
    "modifiers_of",
]
