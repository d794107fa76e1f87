"""The truth: plain torch hooks on a model of one process, with nothing of this library in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

__all__ = ["hook_raw", "recorder"]

Visit = Callable[[Tensor], Tensor]


def hook_raw(module: nn.Module, kind: str, index: int, visit: Visit) -> RemovableHandle:
    """Hook one tensor at a module's boundary.

    Args:
        module: the module.
        kind: ``forward``, ``forward_pre``, ``full_backward`` or ``full_backward_pre``.
        index: which tensor, counting tensors only.
        visit: gets the tensor and returns what takes its place; the same object changes nothing.
    """

    def on_tree(tree: Any) -> Any:
        return _replaced(tree, index, visit)

    if kind == "forward":
        return module.register_forward_hook(lambda module, args, output: on_tree(output))
    if kind == "forward_pre":
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: on_tree((args, kwargs)), with_kwargs=True
        )
    if kind == "full_backward":
        return module.register_full_backward_hook(lambda module, grad_input, _: on_tree(grad_input))
    return module.register_full_backward_pre_hook(lambda module, grad_output: on_tree(grad_output))


def recorder(records: list[Tensor], edit: Visit | None) -> Visit:
    """A visit that keeps a copy of the tensor as it was before the edit."""

    def visit(tensor: Tensor) -> Tensor:
        records.append(tensor.detach().clone())
        return tensor if edit is None else edit(tensor)

    return visit


def _replaced(tree: Any, index: int, visit: Visit) -> Any:
    leaves, spec = tree_flatten(tree)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)][index]
    visited = visit(leaves[at])
    if visited is leaves[at]:
        return None
    return tree_unflatten([*leaves[:at], visited, *leaves[at + 1 :]], spec)
