"""What a checkpoint is of: the ranks, the model and the hooks, and where two differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flex_model.distributed.mesh import MESH_DIMS, ParallelMesh
from flex_model.importance.hook import ForwardHook
from flex_model.layouts.names import named_parameters

__all__ = ["PER_RANK", "difference", "fingerprint"]

Facts = Mapping[str, Any]

# What other ranks of one run have otherwise.
PER_RANK = ("parameters", "weights")
_SAMPLES = 16
_FORMAT = 1


def fingerprint(
    model: nn.Module, hooks: Mapping[str, ForwardHook], mesh: ParallelMesh
) -> dict[str, Any]:
    """This rank's facts, in what JSON holds.

    Of each parameter the digest takes a few entries: enough to tell other weights, and no pass over
    all of them.
    """
    parameters = dict(named_parameters(model))
    facts = {
        "format": _FORMAT,
        "ranks": len(mesh.ranks) if mesh.names else 1,
        "mesh": {name: mesh.size(name) for name in MESH_DIMS},
        "hooks": {
            key: {"class": type(hook).__name__, **hook.made_with} for key, hook in hooks.items()
        },
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "parameters": {name: [str(p.dtype), *_local(p).shape] for name, p in parameters.items()},
        "weights": _digest(parameters),
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain


def difference(saved: Facts, here: Facts) -> str | None:
    """The first thing in which facts of a checkpoint are others than this run's; None if in none.

    What is not saved is not compared.
    """
    return next(_differences(saved, here), None)


def _differences(saved: Facts, here: Facts) -> Iterator[str]:
    saved = {**here, **saved}
    if saved["format"] != here["format"]:
        yield f"it has format {saved['format']}, this version writes {here['format']}"
    if (saved["ranks"], saved["mesh"]) != (here["ranks"], here["mesh"]):
        yield (
            f"it was made on {_spelled(saved)}, this run has {_spelled(here)}. Resume on as many "
            "ranks, laid out alike"
        )
    if saved["model"] != here["model"]:
        yield f"it is of another model: a {saved['model']}, not a {here['model']}"
    yield from _entries("parameter", saved["parameters"], here["parameters"], "another model")
    yield from _entries("hook", saved["hooks"], here["hooks"], "another set of hooks")
    if saved["weights"] != here["weights"]:
        yield "it is of another model: the same parameters, with other weights"


def _entries(what: str, saved: Facts, here: Facts, other: str) -> Iterator[str]:
    for name in (*saved, *here):
        if name not in here:
            yield f"it is of {other}: its {what} {name} is not in this run"
        elif name not in saved:
            yield f"it is of {other}: it has no {what} {name}"
        elif saved[name] != here[name]:
            yield f"it is of {other}: its {what} {name} was {saved[name]}, here {here[name]}"


def _spelled(facts: Facts) -> str:
    sizes = ", ".join(f"{name}={size}" for name, size in facts["mesh"].items() if size > 1)
    return f"{facts['ranks']} rank(s)" + (f" ({sizes})" if sizes else "")


def _digest(parameters: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, parameter in parameters.items():
        values = _local(parameter).detach()
        total.update(name.encode())
        if not values.is_meta and values.numel():
            step = max(1, values.numel() // _SAMPLES)
            sample = values.reshape(-1)[::step].contiguous().cpu()
            total.update(sample.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
