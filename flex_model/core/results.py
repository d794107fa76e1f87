"""Whether what an editing function returned can take the activation's place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flex_model.core.hook_function import Edit
from flex_model.errors import EditError

__all__ = ["checked"]


def checked(result: Any, due: Tensor, edit: Edit, where: str) -> Tensor:
    """The result, fit to take the place of ``due``.

    Raises:
        EditError: no tensor, or one of another shape, dtype or device. Under autocast another
            floating dtype is cast back.
    """
    if _is_plain(result, due) and (result.shape, result.dtype, result.device) == (
        due.shape,
        due.dtype,
        due.device,
    ):
        return _apart(result)

    def refuse(got: str, way_out: str) -> EditError:
        return EditError(
            f"{where}: editing function {edit.name} returned {got}, but a tensor of shape "
            f"{tuple(due.shape)}, {due.dtype} on {due.device} was due. {way_out}"
        )

    if not isinstance(result, Tensor):
        way_out = "Return the edited tensor." if result is None else "Return a torch.Tensor."
        raise refuse("None" if result is None else type(result).__name__, way_out)
    if not _is_plain(result, due):
        kind = "a DTensor" if isinstance(result, DTensor) else f"a tensor of layout {result.layout}"
        raise refuse(kind, "Return the whole, dense tensor: full_tensor() or to_dense().")
    if result.shape != due.shape:
        raise refuse(f"shape {tuple(result.shape)}", "An edit keeps the activation's shape.")
    if result.device != due.device:
        raise refuse(f"a tensor on {result.device}", "Move it back before returning it.")
    if result.dtype != due.dtype:
        autocast = torch.is_autocast_enabled(due.device.type)
        if not (autocast and result.is_floating_point() and due.is_floating_point()):
            raise refuse(f"dtype {result.dtype}", f"Return result.to({due.dtype}).")
        result = result.to(due.dtype)
    return _apart(result)


def _is_plain(result: Any, due: Tensor) -> bool:
    """Whether it is a tensor of the same make: dense if the activation is, on this rank alone."""
    same = isinstance(result, Tensor) and result.layout == due.layout
    return same and not isinstance(result, DTensor)


def _apart(result: Tensor) -> Tensor:
    """What may be written to in place: no parameter itself, and no entry that stands for many."""
    if isinstance(result, nn.Parameter):
        return result.clone()
    expanded = result.layout == torch.strided and 0 in result.stride()
    return result.contiguous() if expanded else result
