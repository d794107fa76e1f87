"""The functions that tell how activations become a mask, and their names in a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor

from flex_model.errors import SparsityError

__all__ = ["FUNCTIONS", "Functions", "function_named", "import_name"]

FUNCTIONS = ("aggregate_fn", "reduce_fn", "mask_fn", "combine_fn")


@dataclass(frozen=True)
class Functions:
    """How one layer's mask is made.

    Each may declare, by `flex_model.elementwise` and its kin, that a shard suffices.

    Attributes:
        aggregate: ``(aggregate, activation) -> aggregate``.
        reduce: ``aggregate -> statistic``, which the mask is made of.
        mask: ``(statistic, **sparse_config) -> mask``, which broadcasts against the activation.
        combine: ``(aggregate, aggregate) -> aggregate`` of two data-parallel ranks; None adds.
    """

    aggregate: Callable[[Tensor, Tensor], Tensor]
    reduce: Callable[[Tensor], Tensor]
    mask: Callable[..., Tensor]
    combine: Callable[[Tensor, Tensor], Tensor] | None = None


def import_name(function: Callable[..., Any] | None) -> str | None:
    """``module:name`` of a function, by which `function_named` finds it again.

    Raises:
        SparsityError: it cannot be found by a name: a lambda, or a function made inside another.
    """
    if function is None:
        return None
    name = str(getattr(function, "__qualname__", None) or getattr(function, "__name__", ""))
    for module in (getattr(function, "__module__", None), "torch"):
        if module and _found(module, name) is function:
            return f"{module}:{name}"
    raise SparsityError(
        f"{function!r} cannot be saved: functions are saved by name, never pickled, and no module "
        "has this one under its name. Define it at the top of a module."
    )


def function_named(name: str | None) -> Callable[..., Any] | None:
    """The function of an import name, out of the modules that are loaded.

    A file names functions; it must not make this process load code.

    Raises:
        SparsityError: its module is not loaded, or has no such function.
    """
    if name is None:
        return None
    module, _, inner = str(name).partition(":")
    found = _found(module, inner)
    if not callable(found):
        raise SparsityError(
            f"A state names the function {name!r}, which no loaded module has. Import {module!r} "
            "before loading the state."
        )
    return found


def _found(module: str, name: str) -> Any:
    try:
        return attrgetter(name)(sys.modules[module])
    except (AttributeError, KeyError, ValueError):
        return None
