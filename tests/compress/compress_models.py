"""A model for recipes, its batches, and the functions that recipes name."""

import torch
from torch import Tensor, nn

from flex_model import channelwise, elementwise


class Mlp(nn.Module):
    """``[batch, tokens, 6]`` through 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def batches(count: int, size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(size, 5, 6, generator=generator) for _ in range(count)]


@elementwise
def add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


@channelwise
def mean_of_tokens(x: Tensor) -> Tensor:
    return x.mean((0, 1))


@elementwise
def above(x: Tensor, threshold: float) -> Tensor:
    return (x.abs() >= threshold).to(x.dtype)
