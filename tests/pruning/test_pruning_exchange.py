"""The exchange below sharded pruning: rows by number, from whoever holds them."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flex_model.pruning.sharded import _exchange
from flex_model.testing.ranks import run_ranks


def _exchanged(held: list[Tensor], wanted: list[Tensor]) -> bool:
    rows = torch.stack([held[dist.get_rank()].float(), -held[dist.get_rank()].float()], 1)
    found = _exchange(rows, held, wanted, dist.group.WORLD)
    due = wanted[dist.get_rank()].float()
    return torch.equal(found, torch.stack([due, -due], 1))


@pytest.mark.parametrize("seed", range(3))
def test_rows_come_from_whoever_holds_them(seed: int) -> None:
    """Catches rows that are lost or come in the order of ranks: three ranks, uneven, some idle."""
    stream = torch.Generator().manual_seed(seed)
    held = [own.sort().values for own in torch.randperm(20, generator=stream).split([9, 0, 11])]
    wanted = torch.randperm(20, generator=stream)[:13].split([5, 8, 0])
    assert run_ranks(_exchanged, 3, held, list(wanted)) == [True] * 3
