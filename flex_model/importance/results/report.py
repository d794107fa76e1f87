"""What a run leaves on disk: scores for pipelines and for pruning, a picture and a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from flex_model.importance import files
from flex_model.importance.hook import ForwardHook
from flex_model.importance.results.merged import pruning_scores
from flex_model.importance.results.page import page
from flex_model.importance.results.plot import draw, png
from flex_model.importance.results.summary import Row, families, rows

__all__ = ["write_report"]


def write_report(
    scores: Mapping[str, Mapping[str, Tensor]],
    hooks: Mapping[str, ForwardHook],
    folder: str | Path,
    title: str = "Importance scores",
    args: Any = None,
) -> list[Row]:
    """Write ``scores.safetensors``, ``scores.png`` and ``scores.html``. On one rank.

    Args:
        scores: what `score` returned.
        hooks: that it was given.
        folder: made if it does not exist.
        title: of the page.
        args: what the run was started with, for the page.

    Returns:
        What the page's table shows, for other tables.

    Raises:
        ImportanceError: a file cannot be written; those before are as they were.
    """
    found = rows(scores, hooks)
    picture = png(draw(families(found)))
    text = page(title, found, picture, files.as_container(args))
    folder = Path(folder)
    writers: dict[Path, Callable[[Path], None]] = {
        folder / "scores.safetensors": lambda path: save_file(pruning_scores(found), path),
        folder / "scores.png": lambda path: _write_bytes(path, picture),
        folder / "scores.html": lambda path: _write_bytes(path, text.encode()),
    }
    files.replaced(writers, lambda what, step: step())
    return found


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
