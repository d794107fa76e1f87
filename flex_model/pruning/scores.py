"""Importance scores as they come in: by module name, one number for each index, higher = keep."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from flex_model.errors import PruningError
from flex_model.layouts.names import named_modules
from flex_model.pruning.dimensions import Dimensions, Space, read

__all__ = ["Scores", "check_names", "random_scores", "read_scores", "scores_of"]

Scores = Mapping[str, Tensor]


def read_scores(file: str | Path) -> dict[str, Tensor]:
    """Scores from a safetensors file: one tensor for each name.

    Raises:
        PruningError: no such file, or another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise PruningError(f"{file} is no safetensors file with scores: {error}.") from None


def random_scores(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Scores that know nothing, for all that can be cut: what any others have to beat.

    Args:
        model: whole or sharded.
        seed: of a stream of their own. The same on every rank.

    Returns:
        By name, each of its space's shape, uniform in [0, 1).
    """
    stream = torch.Generator().manual_seed(seed)
    spaces = read(model).spaces.values()
    return {space.name: torch.rand(space.shape, generator=stream) for space in spaces}


def check_names(model: nn.Module, dimensions: Dimensions, scores: Scores) -> None:
    """Every score is some module's, or some dimension's.

    Raises:
        PruningError: naming the score, and the nearest names that there are.
    """
    known = {name for name, _ in named_modules(model)} | set(dimensions.spaces)
    for name in scores:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.3)
            raise PruningError(
                f"Scores are given for {name!r}, an unknown module. The nearest that the model "
                f"has are: {', '.join(near) or 'none'}."
            )


def scores_of(space: Space, scores: Scores) -> Tensor:
    """The scores of one space, on the CPU.

    Returns:
        Of ``space.shape``, float64.

    Raises:
        PruningError: none are given, they are of another shape, or some are NaN.
    """
    names = (space.name, *space.aliases)
    given = [name for name in names if name in scores]
    if not given:
        raise PruningError(f"To cut {space.dimension}, scores of {' or '.join(names)} are needed.")
    name, found = given[0], scores[given[0]]
    if type(found) not in (Tensor, nn.Parameter) or found.is_complex():
        raise PruningError(f"Scores are plain tensors of numbers, got {type(found)} for {name}.")
    if tuple(found.shape) != space.shape:
        raise PruningError(
            f"{name} has {space.field}={space.size} indexes to score, which takes a tensor of "
            f"shape {space.shape}; its scores have the shape {tuple(found.shape)}."
        )
    values = found.detach().to("cpu", torch.float64)
    if values.isnan().any():
        raise PruningError(f"{int(values.isnan().sum())} scores of {name} are NaN.")
    return values
