"""A model small enough to check by hand, whole and sharded, and what plain torch makes of it.

Two ranks run it tensor-parallel (torch's own ``parallelize_module``) or data-parallel. The truth is
one process with torch's own hooks: see ``Truth``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from flex_model import FlexModel

WIDTH, INNER, TOKENS, BATCH = 6, 8, 5, 4

Edit = Callable[[nn.Module, Tensor, Any, Any], Tensor]


class Mlp(nn.Module):
    """``x + down(act(up(norm(x))))``: replicated, sharded and summed values one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.act = nn.GELU()
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


def whole(layers: int = 1) -> nn.Sequential:
    """The same values in every process."""
    model = nn.Sequential(*(Mlp() for _ in range(layers)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def tensor_parallel(layers: int = 1) -> nn.Sequential:
    """This rank's part of the same model."""
    model = whole(layers)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for layer in model:
        parallelize_module(layer, mesh, plan)
    return model


def batch(seed: int = 1) -> Tensor:
    """The whole batch, ``[batch, tokens, width]``, a leaf that takes a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, TOKENS, WIDTH, generator=generator).requires_grad_()


def weights_of_loss() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))


def probe(width: int) -> nn.Linear:
    """A trainable module with the same values in every process."""
    made = nn.Linear(width, width)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


def plain_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name, as one process has them."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        grad = parameter.grad
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return found


@dataclass
class Ways:
    """How the job runs on two ranks: which model, and which part of the batch this rank takes."""

    name: str
    model: Callable[..., nn.Sequential] = whole
    sizes: dict[str, int] = field(default_factory=dict)

    def flex(self, model: nn.Module, records: dict[str, list[Tensor]], **options: Any) -> FlexModel:
        return FlexModel(model, records, **self.sizes, **options)

    @property
    def is_dp(self) -> bool:
        return "data_parallel_size" in self.sizes

    def part(self, x: Tensor) -> Tensor:
        """This rank's part of what the batch's leading dim runs along."""
        return x.chunk(2)[dist.get_rank()] if self.is_dp else x

    def leaf(self, seed: int = 1) -> Tensor:
        return self.part(batch(seed).detach()).clone().requires_grad_()

    def loss(self, out: Tensor) -> Tensor:
        """This rank's loss; the one-process loss is their mean over data-parallel ranks."""
        return (out * self.part(weights_of_loss())).sum()

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """Whole weight gradients, after the reduction that data parallelism makes."""
        found = plain_gradients(model)
        if self.is_dp:
            for grad in found.values():
                dist.all_reduce(grad)
                grad /= 2
        return found

    def input_gradient(self, due: Tensor) -> Tensor:
        """What this rank should hold of the one-process input gradient."""
        return self.part(due) * (2 if self.is_dp else 1)


def ways() -> tuple[Ways, Ways]:
    return (
        Ways("tp", tensor_parallel, {"tensor_parallel_size": 2}),
        Ways("dp", whole, {"data_parallel_size": 2}),
    )


def one_process_loss(out: Tensor, way: Ways) -> Tensor:
    """The loss of the whole batch in one process: a mean over ranks where these share it out."""
    return (out * weights_of_loss()).sum() / (2 if way.is_dp else 1)


def close(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    """Equal up to sums that run in another order."""
    assert actual is not None, what
    assert expected is not None, what
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, {expected.shape} is due"
    scale = expected.abs().max().item() or 1.0
    error = (actual - expected).abs().max().item() / scale
    assert error <= 1e-5, f"{what}: relative error {error:.1e}"
