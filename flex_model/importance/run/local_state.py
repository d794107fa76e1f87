"""Hooks' states as they lie on this rank: nothing is moved to save them, or to take them up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flex_model.distributed.mesh import ParallelMesh
from flex_model.importance.hook import ForwardHook

__all__ = ["local_states", "take_up"]

Nested = Mapping[str, Mapping[str, Any]]


def local_states(hooks: Mapping[str, ForwardHook]) -> dict[str, dict[str, Any]]:
    """Every hook's counters and own terms of its sums, by its key, for a file."""
    states: dict[str, dict[str, Any]] = {}
    for key, hook in hooks.items():
        states[key] = {"counters": hook.counters}
        for name, total in hook.sums.items():
            tensors, facts = total.local_state()
            states[key][f"{name}.facts"] = facts
            states[key].update({f"{name}.{which}": tensor for which, tensor in tensors.items()})
    return states


def take_up(
    hooks: Mapping[str, ForwardHook],
    states: Nested,
    mesh: ParallelMesh,
    device: torch.device | None,
) -> None:
    """Let hooks go on from `local_states` of the same rank of a job laid out alike.

    Args:
        hooks: made as those were.
        states: by the same keys.
        mesh: the job's ranks.
        device: where the model is.
    """
    for key, hook in hooks.items():
        hook.counters = states[key]["counters"]
        for name, total in hook.sums.items():
            prefix = f"{name}."
            found = {
                k.removeprefix(prefix): v for k, v in states[key].items() if k.startswith(prefix)
            }
            facts = found.pop("facts")
            here = {k: v.to(device or v.device) for k, v in found.items()}
            total.load_local_state(here, facts, mesh)
