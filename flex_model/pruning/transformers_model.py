"""A transformers model from its folder, in the dtype that it was saved in."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from flex_model.errors import PruningError
from flex_model.loading.transformers_model import from_directory

__all__ = ["from_folder"]


def from_folder(folder: Path, ranks: int) -> nn.Module:
    """The model, whole or (on several ranks) this rank's part of it by its ``tp_plan``.

    Raises:
        PruningError: there is no model that can be loaded.
    """
    try:
        return from_directory(folder, ranks, dtype="auto", caching=True).eval()
    except (OSError, ValueError) as error:
        raise PruningError(f"{folder} holds no model that can be loaded: {error}") from error
