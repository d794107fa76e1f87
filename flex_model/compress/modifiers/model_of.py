"""The FlexModel that a modifier works on."""

from __future__ import annotations

from fnmatch import fnmatchcase

from flex_model.compress.state import State
from flex_model.core.flex_model import FlexModel
from flex_model.errors import CompressionError
from flex_model.layouts.names import named_modules

__all__ = ["flex_model_of", "layers_of"]


def flex_model_of(state: State, who: str) -> FlexModel:
    """The state's model, wrapped if it is not yet.

    Raises:
        CompressionError: there is none.
    """
    if state.model is None:
        raise CompressionError(f"{who} needs a model: lifecycle.initialize(model=...).")
    return state.model if isinstance(state.model, FlexModel) else FlexModel(state.model, {})


def layers_of(model: FlexModel, patterns: list[str]) -> list[str]:
    """The names of the modules that match a shell pattern, each once, in the model's order.

    Raises:
        CompressionError: a pattern matches none.
    """
    names = [name for name, _ in named_modules(model.module)]
    idle = [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]
    if idle or not patterns:
        raise CompressionError(f"No module of the model matches {idle or 'an empty list'}.")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
