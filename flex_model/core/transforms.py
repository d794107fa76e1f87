"""Values inside a torch.func transform, where tensors are wrapped for as long as it runs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["plain_values"]


def plain_values(tensor: Tensor) -> Tensor:
    """The values without the wrappers of grad, jvp and vmap; a vmapped dim comes first."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        dim = functorch.maybe_get_bdim(tensor)
        tensor = functorch.get_unwrapped(tensor)
        tensor = tensor.movedim(dim, 0) if dim >= 0 else tensor
    return tensor
