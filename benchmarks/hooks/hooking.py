"""Hooks on a model, plain and by the library: written once for both versions of the library.

Only names and arguments are used that flex-model 0.1.0 and this library share.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from flex_model.core import FlexModel, HookFunction

__all__ = ["Records", "edit", "hook_raw", "wrap"]

Records = dict[str, list[Tensor]]


def edit(
    current_module: nn.Module | None,
    inputs: Tensor,
    save_ctx: Namespace | None = None,
    modules: nn.ModuleDict | None = None,
) -> Tensor:
    """The editing function of every way that edits."""
    return inputs * 1.001


def wrap(
    model: nn.Module,
    names: Sequence[str],
    editing_function: Callable[..., Tensor] | None = None,
    expected_shape: tuple[int | None, ...] | None = None,
) -> tuple[nn.Module, Records]:
    """The library's wrapper with a hook function on each module, and where its records go."""
    records: Records = {}
    # 0.1.0 makes a group on NCCL where none is given.
    wrapped = FlexModel(
        model,
        records,
        tensor_parallel_size=dist.get_world_size(),
        process_group=dist.group.WORLD,
    )
    for name in names:
        wrapped.register_forward_hook(HookFunction(name, expected_shape, editing_function))
    return wrapped, records


def hook_raw(
    model: nn.Module, names: Sequence[str], visit: Callable[[Tensor, list[Tensor]], Tensor | None]
) -> Records:
    """torch's own forward hooks.

    Args:
        model: the model.
        names: the modules; each returns one tensor.
        visit: gets the module's output and the list it may record to; what it returns takes the
            output's place.
    """
    records: Records = {}
    for name in names:

        def hook(module: nn.Module, args: Any, output: Tensor, name: str = name) -> Tensor | None:
            return visit(output, records.setdefault(name, []))

        model.get_submodule(name).register_forward_hook(hook)
    return records
