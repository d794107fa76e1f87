"""The errors flex_model raises, one class per rule a caller can break.

Every class shares the base `FlexModelError`, so one ``except`` clause catches them all, and
also derives from the built-in error a caller would expect (``ValueError`` for a bad value,
``TypeError`` for a bad type, ``RuntimeError`` for a state that came about while running).
"""

from __future__ import annotations

__all__ = [
    "CompressionError",
    "ConfigurationError",
    "CopyError",
    "EditError",
    "FlexModelError",
    "GradientPlacementError",
    "GroupError",
    "HintError",
    "ImportanceError",
    "LayoutError",
    "NothingCollectedError",
    "PruningError",
    "RankDisagreementError",
    "RankFailedError",
    "RecomputeError",
    "RegistrationError",
    "UnknownModuleError",
]


class FlexModelError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigurationError(FlexModelError, ValueError):
    """Sizes, mesh, process group or options of a FlexModel do not fit the job."""


class CopyError(FlexModelError, TypeError):
    """A FlexModel, or a model with its hooks on, cannot be copied or pickled in this way."""


class RegistrationError(FlexModelError, ValueError):
    """A hook function or trainable module cannot be registered as asked."""


class UnknownModuleError(RegistrationError):
    """A hook names a module or parameter that the wrapped model does not have."""


class GroupError(FlexModelError, ValueError):
    """A hook group is unknown, or the operation is not allowed on it."""


class LayoutError(FlexModelError, RuntimeError):
    """It cannot be told how an activation lies over the ranks."""


class HintError(FlexModelError, ValueError):
    """An ``expected_shape`` or placement hint contradicts what is on the ranks."""


class EditError(FlexModelError, TypeError):
    """An editing function returned something that cannot take the activation's place."""


class CompressionError(FlexModelError, ValueError):
    """A model cannot be transformed as asked, or a recipe's steps come in another order than they
    can run.
    """


class PruningError(FlexModelError, ValueError):
    """A model cannot be pruned as asked: its architecture, the scores or the target do not fit."""


class GradientPlacementError(FlexModelError, RuntimeError):
    """It stays undecided whether the ranks hold a gradient whole or as terms of a sum."""


class RankDisagreementError(FlexModelError, RuntimeError):
    """Ranks of one job run different hooks, inputs or losses."""


class RecomputeError(FlexModelError, RuntimeError):
    """A random edit was recomputed (activation checkpointing) on another activation."""


class RankFailedError(FlexModelError, RuntimeError):
    """Another rank raised, was killed or left, so that this one would wait for it in vain."""


class ImportanceError(FlexModelError, RuntimeError):
    """Scores of channels, heads or layers cannot be computed, stored or restored as asked."""


class NothingCollectedError(ImportanceError, AssertionError):
    """Scores are asked for that nothing, or not enough, has been collected for."""
