"""Weights that accelerate keeps off the devices, on disk or in a copy in main memory.

Its device maps replace a module's forward by one that fetches the weights and drops them after;
between forwards such a weight is a meta tensor, and the hook on its module, or on a module around
that, knows where the values are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from flex_model.layouts.names import named_modules
from flex_model.layouts.sources import loaded

__all__ = ["offloaded"]


def offloaded(root: nn.Module, name: str) -> Tensor | None:
    """The values of an offloaded weight; None where no hook holds them.

    Args:
        root: the wrapped model.
        name: the parameter's plain name.
    """
    hooks = loaded("accelerate.hooks")
    if hooks is None:
        return None
    for prefix, module in named_modules(root):
        path = f"{prefix}." if prefix else ""
        if not name.startswith(path):
            continue
        for hook in _hooks_in(getattr(module, "_hf_hook", None), hooks):
            held = hook.weights_map if hook.offload else None
            own = name.removeprefix(path)
            if held is not None and own in held:
                return held[own]
    return None


def _hooks_in(hook: Any, hooks: Any) -> Iterator[Any]:
    """The hooks that move weights, out of a chain of hooks."""
    if isinstance(hook, hooks.SequentialHook):
        for part in hook.hooks:
            yield from _hooks_in(part, hooks)
    elif isinstance(hook, hooks.AlignDevicesHook):
        yield hook
