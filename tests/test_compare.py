"""The measure that parity is told in, and that the grid can fail."""

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from flex_model.testing.compare import relative_error
from flex_model.testing.grid import measure_bare
from frameworks import ddp_llama, tiny_llama
from frameworks.rows import row


def test_it_is_the_largest_difference_over_the_largest_value():
    assert relative_error(torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0])) == 0.125


def test_against_zeros_it_is_the_largest_value():
    assert relative_error(torch.tensor([0.25, 0.0]), torch.zeros(2)) == 0.25


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.ones(2), torch.ones(1, 2)),
        (torch.tensor([math.nan]), torch.ones(1)),
        (torch.ones(1), torch.tensor([math.nan])),
        (torch.ones(1), None),
        (None, torch.ones(1)),
    ],
)
def test_what_cannot_be_compared_is_infinitely_far_off(actual, expected):
    assert relative_error(actual, expected) == math.inf


class Unreduced(nn.Module):
    """The model under the name that DistributedDataParallel gives it, and nothing else."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.module(ids)


@contextmanager
def _without_reduction():
    yield ddp_llama.model_on(Unreduced(tiny_llama.filled()), dist.get_rank())


def test_the_grid_sees_a_reduction_that_is_left_out():
    errors = measure_bare(replace(row("ddp"), sharded=_without_reduction))
    assert errors["output"] <= 1e-6
    assert errors["weight grad"] > 1e-2
