"""A `2048 -> 512` linear layer on `[4, 128, 2048]` tokens, and each library's hooks on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from modelopt.torch.prune import importance_hooks as modelopt
from torch import nn

from flex_model import importance
from timing import Seconds, Way
from traffic import Memory

__all__ = ["CALLS", "INPUTS", "KINDS", "LIBRARIES", "OUTPUTS", "SHAPE", "peak", "ways"]

INPUTS, OUTPUTS, SHAPE, CALLS = 2048, 512, (4, 128), 64
LIBRARIES: dict[str, Any] = {"this library": importance, "ModelOpt": modelopt}
KINDS = ("L2", "Independent", "Iterative", "Iterative, scaled")
_CALLS_OF = {"L2": 16, "Independent": 16, "Iterative": CALLS, "Iterative, scaled": CALLS}
_ENDLESS = ("L2", "Independent")  # these may be called once before: norms are taken then


@dataclass(frozen=True)
class Setting:
    """The layer, one input and its output."""

    layer: nn.Linear
    x: torch.Tensor
    y: torch.Tensor


def setting() -> Setting:
    """The same in every run."""
    torch.manual_seed(0)
    layer = nn.Linear(INPUTS, OUTPUTS, bias=False)
    x = torch.randn(*SHAPE, INPUTS)
    with torch.no_grad():
        return Setting(layer, x, layer(x))


def new_hook(library: str, kind: str, layer: nn.Linear) -> Callable[..., Any]:
    """One library's hook of a kind."""
    made = LIBRARIES[library]
    if kind == "L2":
        return made.L2NormHook()
    if kind == "Independent":
        return made.IndependentChannelContributionHook(layer)
    method = "scale_by_magnitude" if kind.endswith("scaled") else None
    kwargs = {"validation_full_iters": CALLS, "calibration_method": method,
              "clear_gpu_memory": False}  # fmt: skip
    return made.IterativeChannelContributionHook(layer, kwargs)


def ways() -> dict[str, Way]:
    """Every kind of both libraries, and the bare layer: seconds per call."""
    given = setting()

    def hook(library: str, kind: str) -> Way:
        def way() -> Seconds:
            called = new_hook(library, kind, given.layer)
            calls = _CALLS_OF[kind]
            with torch.no_grad():
                if kind in _ENDLESS:
                    called(given.layer, (given.x,), given.y)
                begin = time.perf_counter()
                for _ in range(calls):
                    called(given.layer, (given.x,), given.y)
                return {"call": (time.perf_counter() - begin) / calls}

        return way

    def bare() -> Seconds:
        with torch.no_grad():
            begin = time.perf_counter()
            for _ in range(16):
                given.layer(given.x)
            return {"call": (time.perf_counter() - begin) / 16}

    found: dict[str, Way] = {"bare": bare}
    for kind in KINDS:
        for library in LIBRARIES:
            found[f"{library}: {kind}"] = hook(library, kind)
    return found


def peak(library: str, kind: str) -> float:
    """The most that one call holds at a time beyond what was there, in inputs; over all calls."""
    given, most = setting(), 0
    hook = new_hook(library, kind, given.layer)
    with torch.no_grad():
        for _ in range(_CALLS_OF[kind]):
            with Memory(given.x, given.y, given.layer.weight) as memory:
                hook(given.layer, (given.x,), given.y)
            most = max(most, memory.peak)
    return most / given.x.nbytes
