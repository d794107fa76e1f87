"""What cannot be fused into weights: R3 on queries and keys behind RoPE, R4 on the MLP's inside.

These are ordinary hooks, and where transformers has no module in which queries and keys meet, an
attention function of the kind that it lets libraries register.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flex_model.compress.spinquant.orthogonal import Rotation
from flex_model.compress.spinquant.sharded import Cut, turn
from flex_model.errors import CompressionError
from flex_model.layouts.sources import loaded

__all__ = ["check_heads", "rotate_heads", "rotate_input"]

_NAME = "flex_model_rotated"
_IMPLEMENTATIONS = ("eager", "sdpa")


def rotate_input(module: nn.Module, rotation: Rotation, cut: Cut | None, undo: ExitStack) -> None:
    """R4: ``x <- x R`` before a module, on what this rank has of x.

    Args:
        module: its first argument is x, ``[..., features]``.
        rotation: R.
        cut: how the ranks hold the module's input features where its input is cut likewise.
        undo: takes the hook off.
    """
    hook = _Input(rotation, cut)
    undo.callback(module.register_forward_pre_hook(hook, prepend=True).remove)


@dataclass(frozen=True)
class _Input:
    rotation: Rotation
    cut: Cut | None

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        here = self.cut if self.cut is not None and x.shape[-1] != self.cut.length else None
        return turn(x, -1, self.rotation, here), *args[1:]


def check_heads(attention: nn.Module, name: str) -> None:
    """That queries and keys of an attention module can be reached behind RoPE.

    Raises:
        CompressionError: they cannot.
    """
    if hasattr(attention, "core_attention"):
        return
    used = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if loaded("transformers.modeling_utils") is None or used is None:
        raise CompressionError(
            f"R3: {name} ({type(attention).__name__}) has no place in which queries and keys meet "
            "that a hook reaches: neither Megatron's core_attention nor transformers' attention."
        )
    if used not in _IMPLEMENTATIONS:
        raise CompressionError(
            f"R3: {name} runs attention {used!r}; {' and '.join(_IMPLEMENTATIONS)} can be rotated."
        )


def rotate_heads(attention: nn.Module, rotation: Rotation, undo: ExitStack) -> None:
    """R3: ``q <- q R, k <- k R`` behind RoPE, which leaves every ``q k^T`` as it was.

    Args:
        attention: one that `check_heads` passes.
        rotation: R, of a head's size or a part of it.
        undo: takes it off again.
    """
    core = getattr(attention, "core_attention", None)
    if core is not None:
        undo.callback(core.register_forward_pre_hook(_Heads(rotation), prepend=True).remove)
        return
    config: Any = attention.config
    rotated = copy.copy(config)  # of this module alone: masks are made by the model's
    rotated._attn_implementation_internal = _NAME
    _register()
    undo.callback(setattr, attention, "config", config)
    undo.callback(vars(attention).pop, "_flex_model_r3")
    attention.config = rotated
    vars(attention)["_flex_model_r3"] = (rotation, config)


@dataclass(frozen=True)
class _Heads:
    rotation: Rotation

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        query, key, *rest = args
        return turn(query, -1, self.rotation), turn(key, -1, self.rotation), *rest


def _register() -> None:
    library: Any = loaded("transformers.modeling_utils")
    if _NAME not in library.ALL_ATTENTION_FUNCTIONS:
        library.AttentionInterface.register(_NAME, _rotated_attention)


def _rotated_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The attention that the module would run, of rotated queries and keys.

    Args:
        module: the attention module.
        query: ``[batch, heads, sequence, head_dim]``.
        key: likewise, of fewer heads maybe, all that are cached.
        value: as it is.
        *args: the mask and what else there is.
        **kwargs: likewise.
    """
    rotation, config = module._flex_model_r3
    run = _implementation(module, config._attn_implementation)
    return run(module, turn(query, -1, rotation), turn(key, -1, rotation), value, *args, **kwargs)


def _implementation(module: nn.Module, name: str) -> Callable[..., Any]:
    """By name; "eager" is a function of its own in each model's file."""
    library: Any = loaded("transformers.modeling_utils")
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., Any] = library.ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return found
