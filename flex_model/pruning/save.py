"""Writing a pruned model as a plain transformers checkpoint, sharded or not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flex_model.errors import PruningError
from flex_model.pruning.agreement import agreed
from flex_model.pruning.sharded import ranks_of

__all__ = ["save"]


def save(model: nn.Module, path: str | Path) -> None:
    """Write a checkpoint that ``from_pretrained`` loads, whole. Collective where it is sharded.

    The folder appears under its name once all of it is written. The first rank writes it.

    Args:
        model: whole, or sharded over tensor-parallel ranks.
        path: the folder, which must not exist.

    Raises:
        PruningError: there is something at the path, or it cannot be written; on every rank alike.
    """
    folder = Path(path)
    group = ranks_of(model)
    writes = group is None or group.rank() == 0
    agreed(model, lambda: _check_free(folder) if writes else None, repr)
    whole = _whole_weights(model, writes)
    agreed(model, lambda: _write(model, whole, folder) if writes else None, repr)


def _check_free(folder: Path) -> None:
    if folder.exists():
        raise PruningError(f"{folder} exists already. Give the name of a new folder.")


def _whole_weights(model: nn.Module, keeps: bool) -> dict[str, Tensor]:
    """Every weight in whole on the CPU, where they are kept; tied ones are one tensor."""
    found: dict[int, Tensor] = {}
    weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in found:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found[id(tensor)] = whole.detach().cpu() if keeps else whole.new_empty(0)
        weights[name] = found[id(tensor)]
    return weights


def _write(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    unfinished = folder.with_name(f".{folder.name}-{uuid4().hex[:8]}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
    except OSError as error:
        raise PruningError(f"{folder} cannot be written: {error}.") from error
    try:
        with _as_on_one_process(model):
            model.save_pretrained(unfinished, state_dict=weights)
        unfinished.rename(folder)
    except OSError as error:
        raise PruningError(f"{folder} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _as_on_one_process(model: Any) -> Iterator[None]:
    """transformers would gather once more, and wait for ranks that do not write."""
    spread = vars(model.config).pop("distributed_config", None)
    try:
        yield
    finally:
        if spread is not None:
            model.config.distributed_config = spread
