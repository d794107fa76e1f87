"""Recipes: lists of modifiers, in a file or in code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from flex_model.compress.modifier import Modifier
from flex_model.compress.modifiers import GroupsModifier, ScoreModifier, SparsifyModifier
from flex_model.compress.spinquant.modifier import SpinQuantModifier
from flex_model.errors import CompressionError

__all__ = ["KINDS", "modifiers_of"]

KINDS: Mapping[str, type[Modifier]] = {
    "groups": GroupsModifier,
    "score": ScoreModifier,
    "sparsify": SparsifyModifier,
    "spinquant": SpinQuantModifier,
}


def modifiers_of(
    recipe: ListConfig | Sequence[Mapping[str, Any]] | str | Path,
    kinds: Mapping[str, type[Modifier]] | None = None,
) -> list[Modifier]:
    """The modifiers of a recipe, in its order, each new.

    Args:
        recipe: a list of ``{kind: fields}``, as an OmegaConf list, plain, or a YAML file's path.
        kinds: modifiers of the caller's by name, besides `KINDS`.

    Raises:
        CompressionError: no such kind, or fields that a kind does not take, all of them named.

    Examples:
        >>> modifiers_of([{"groups": {"groups": ["probes"], "start": 10, "end": 20}}])
    """
    known = {**KINDS, **(kinds or {})}
    steps = _plain(recipe)
    if not isinstance(steps, list):
        raise CompressionError(f"A recipe is a list of modifiers, not a {type(steps).__name__}.")
    return [_made(index, step, known) for index, step in enumerate(steps)]


def _plain(recipe: Any) -> Any:
    try:
        if isinstance(recipe, (str, Path)):
            recipe = OmegaConf.load(recipe)
        return (
            OmegaConf.to_container(recipe, resolve=True) if OmegaConf.is_config(recipe) else recipe
        )
    except (OSError, OmegaConfBaseException) as error:
        raise CompressionError(f"The recipe cannot be read: {error}") from error


def _made(index: int, step: Any, known: Mapping[str, type[Modifier]]) -> Modifier:
    if not isinstance(step, Mapping) or len(step) != 1:
        raise CompressionError(
            f"Step {index} of the recipe must be one {{kind: fields}}: {step!r}."
        )
    ((kind, fields),) = step.items()
    if kind not in known:
        raise CompressionError(
            f"Step {index} of the recipe is a {kind!r}; there are {sorted(known)}."
        )
    try:
        return known[kind](**{"index": index, **(fields or {})})
    except (ValidationError, TypeError) as error:
        raise CompressionError(f"Step {index} of the recipe ({kind}): {error}") from error
