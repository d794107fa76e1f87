"""What ``debug=True`` finds: NaNs, and replicas that are edited differently."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import ways
from torch import Tensor, nn

from flex_model import FlexModel, HookFunction
from flex_model.errors import EditError, RankDisagreementError
from flex_model.testing.ranks import run_ranks


def _doubled(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x * 2


def _by_rank(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x + 0.1 * dist.get_rank()


def _makes_nan(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return (x - x) / (x - x)


def _replicas(way: int) -> str:
    run = ways()[way]
    with run.flex(run.model(), {}, debug=True) as flex:
        flex.register_forward_hook(HookFunction("0.norm", editing_function=_doubled))
        flex.register_forward_hook(HookFunction("0.up", editing_function=_by_rank))
        flex.register_forward_hook(HookFunction("0.down", editing_function=_by_rank))
        with pytest.raises(RankDisagreementError) as caught:
            flex(run.leaf())
    return str(caught.value)


@pytest.mark.parametrize("way", [0, 1])
def test_the_first_hook_where_replicas_differ_is_named(way: int) -> None:
    """Catches an edit that goes by its rank, whose shards then are of different tensors."""
    for message in run_ranks(_replicas, 2, way):
        assert message.startswith("0.up (forward")
        assert "ranks [1]" in message
        assert "rank 0" in message


def _undisturbed(way: int) -> None:
    run = ways()[way]
    outs = []
    for debug in (False, True):
        with run.flex(run.model(), {}, debug=debug) as flex:
            flex.register_forward_hook(HookFunction("0.up", editing_function=_doubled))
            outs.append(flex(run.leaf()))
    assert torch.equal(*outs)


@pytest.mark.parametrize("way", [0, 1])
def test_an_edit_without_fault_passes(way: int) -> None:
    """Catches a false alarm, and a result that debugging changes."""
    run_ranks(_undisturbed, 2, way)


def test_a_nan_is_named_where_it_is_made() -> None:
    """Catches a NaN that shows in the loss only; one in the input is no fault of the edit."""
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    with FlexModel(model, {}, debug=True) as flex:
        flex.register_forward_hook(HookFunction("1", editing_function=_doubled))
        assert flex(torch.tensor([torch.nan, 1.0])).isnan().any()
        flex.register_forward_hook(HookFunction("0", editing_function=_makes_nan))
        with pytest.raises(EditError, match=r"0 \(forward, rank 0\): _makes_nan made a NaN"):
            flex(torch.ones(3))
    with FlexModel(model, {}) as flex:
        flex.register_forward_hook(HookFunction("0", editing_function=_makes_nan))
        assert flex(torch.ones(3)).isnan().all(), "without debug nothing is looked at"
