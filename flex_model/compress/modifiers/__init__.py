"""The modifiers that come with the library."""

from flex_model.compress.modifiers.groups import GroupsModifier
from flex_model.compress.modifiers.score import ScoreModifier
from flex_model.compress.modifiers.sparsify import SparsifyModifier

__all__ = ["GroupsModifier", "ScoreModifier", "SparsifyModifier"]
