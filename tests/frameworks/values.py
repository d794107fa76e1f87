"""Parameter values, told by a parameter's name alone, and how each is cut over tensor ranks.

Every process can make any whole parameter without talking to another, so a sharded model holds the
very numbers of the whole one whatever its framework's own initialisation does.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def value_of(name: str, shape: tuple[int, ...]) -> Tensor:
    """Norms and biases well away from ones and zeros; weights of a gain below one.

    At a gain of one rounding grows from layer to layer, until what is compared is rounding.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return 0.7 * noise * shape[-1] ** -0.5
    return noise * 0.3 if name.endswith("bias") else 1.0 + 0.3 * noise


@dataclass(frozen=True)
class Cut:
    """How one parameter lies over tensor ranks: along ``dim``, in ``segments`` cut one by one.

    A gated projection ``[gate | up]`` has two segments: each rank holds a part of either.
    """

    dim: int
    segments: int = 1

    def part(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """This rank's part of a whole parameter."""
        parts = [s.chunk(size, self.dim)[rank] for s in whole.chunk(self.segments, self.dim)]
        return torch.cat(parts, self.dim)

    def whole(self, parts: list[Tensor]) -> Tensor:
        """The whole parameter from every rank's part."""
        cut = [part.chunk(self.segments, self.dim) for part in parts]
        return torch.cat([c[i] for i in range(self.segments) for c in cut], self.dim)


def fill(module: nn.Module, cuts: Mapping[str, Cut], rank: int = 0, size: int = 1) -> None:
    """Give every parameter its value, or the part of it that this rank holds."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            cut = cuts.get(name)
            shape = list(parameter.shape)
            if cut is not None:
                shape[cut.dim] *= size
            value = value_of(name, tuple(shape))
            parameter.copy_(value if cut is None else cut.part(value, rank, size))


def gather_grads(
    module: nn.Module,
    cuts: Mapping[str, Cut],
    tp_group: dist.ProcessGroup | None = None,
    dp_group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Whole gradients by name: joined over tensor ranks, their mean over data-parallel ranks."""
    grads = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            continue
        grad = parameter.grad.detach().clone()
        if isinstance(grad, DTensor):
            grad = grad.full_tensor()
        if tp_group is not None and name in cuts:
            parts = [torch.empty_like(grad) for _ in range(tp_group.size())]
            dist.all_gather(parts, grad, group=tp_group)
            grad = cuts[name].whole(parts)
        if dp_group is not None:
            dist.all_reduce(grad, group=dp_group)
            grad /= dp_group.size()
        grads[name] = grad
    return grads
