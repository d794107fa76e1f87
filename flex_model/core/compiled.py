"""Hooks in models that torch.compile has compiled.

Compiled code is made from the hooks that are on when it is made, and torch does not look again: one
that comes later is passed by, and layers of one class share their code whichever of them is hooked.
So whenever hook points come or go, what has been compiled is dropped, and while any are on, what is
compiled looks at the hooks at every call. The hooks themselves are never compiled into it: groups,
records and the ranks' exchanges are decided as they run.
"""

from __future__ import annotations

import torch
import torch._dynamo.config as dynamo

__all__ = ["compile_anew", "uncompiled"]

uncompiled = torch.compiler.disable

_hooked: set[int] = set()
_skipped_before: list[bool] = []


def compile_anew(owner: object, *, hooked: bool) -> None:
    """Let everything be compiled anew at its next call; microseconds where nothing has been.

    Args:
        owner: whose hook points came or went.
        hooked: whether it has any now.
    """
    if hooked and not _hooked:
        _skipped_before.append(dynamo.skip_nnmodule_hook_guards)
        dynamo.skip_nnmodule_hook_guards = False
    (_hooked.add if hooked else _hooked.discard)(id(owner))
    if not _hooked and _skipped_before:
        dynamo.skip_nnmodule_hook_guards = _skipped_before.pop()
    torch.compiler.reset()
