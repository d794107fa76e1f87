"""A sparsifier's state on disk: masks in safetensors, all else in JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flex_model.errors import SparsityError

__all__ = ["read", "write"]

_MASKS, _REST = "sparsifier.safetensors", "sparsifier.json"


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a state dict, from the job's first rank: it is the same on every rank.

    Raises:
        SparsityError: the configuration holds what JSON does not.
    """
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, int | None] = {}
    for name, held in state["state"].items():
        mask = held["mask"]
        masks = mask if isinstance(mask, list) else [] if mask is None else [mask]
        kinds[name] = len(masks) if isinstance(mask, list) else None
        tensors.update({f"{name}:{n}": m.cpu().contiguous() for n, m in enumerate(masks)})
    rest = {"groups": state["data_groups"], "defaults": state["defaults"], "lists": kinds}
    try:
        text = json.dumps(rest, indent=2)
    except TypeError as error:
        raise SparsityError(f"The configuration cannot be written as JSON: {error}.") from error
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    masks_path, rest_path = folder / f".{_MASKS}.unfinished", folder / f".{_REST}.unfinished"
    save_file(tensors, masks_path)
    rest_path.write_text(text)
    os.replace(masks_path, folder / _MASKS)  # noqa: PTH105
    os.replace(rest_path, folder / _REST)  # noqa: PTH105


def read(folder: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        SparsityError: there is nothing, or something else.
    """
    try:
        tensors = load_file(folder / _MASKS)
        rest = json.loads((folder / _REST).read_text())
        state = {}
        for name, count in rest["lists"].items():
            masks = [tensors[f"{name}:{n}"] for n in range(count or 0)]
            state[name] = {"mask": tensors.get(f"{name}:0") if count is None else masks}
        return {"state": state, "data_groups": rest["groups"], "defaults": rest["defaults"]}
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise SparsityError(
            f"{folder} holds no sparsifier's state that can be read ({error})."
        ) from error
