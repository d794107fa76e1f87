"""Whether what an editing function returned can take the activation's place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flex_model.core.hook_function import EditingFunction
from flex_model.errors import EditError

__all__ = ["checked"]


def checked(result: Any, due: Tensor, function: EditingFunction, where: str) -> Tensor:
    """The result, fit to take the place of ``due``.

    Raises:
        EditError: no tensor, or one of another shape, dtype or device. Under autocast another
            floating dtype is cast back.
    """
    if isinstance(result, Tensor) and (result.shape, result.dtype, result.device) == (
        due.shape,
        due.dtype,
        due.device,
    ):
        return result

    def refuse(got: str, way_out: str) -> EditError:
        name = getattr(function, "__name__", repr(function))
        return EditError(
            f"{where}: editing function {name} returned {got}, but a tensor of shape "
            f"{tuple(due.shape)}, {due.dtype} on {due.device} was due. {way_out}"
        )

    if not isinstance(result, Tensor):
        way_out = "Return the edited tensor." if result is None else "Return a torch.Tensor."
        raise refuse("None" if result is None else type(result).__name__, way_out)
    if result.shape != due.shape:
        raise refuse(f"shape {tuple(result.shape)}", "An edit keeps the activation's shape.")
    if result.device != due.device:
        raise refuse(f"a tensor on {result.device}", "Move it back before returning it.")
    if result.dtype != due.dtype:
        autocast = torch.is_autocast_enabled(due.device.type)
        if not (autocast and result.is_floating_point() and due.is_floating_point()):
            raise refuse(f"dtype {result.dtype}", f"Return result.to({due.dtype}).")
        result = result.to(due.dtype)
    return result
