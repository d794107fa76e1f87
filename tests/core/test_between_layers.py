"""Values between two sharded layers, where no framework tells anything: attention by hand."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import close
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from flex_model import DummyModule, FlexModel, HookFunction
from flex_model.errors import LayoutError
from flex_model.testing.ranks import run_ranks

HEAD_DIM, WIDTH = 3, 10

Records = dict[str, list[Tensor]]


class Attention(nn.Module):
    """Softmax attention with a place to hook after every step."""

    def __init__(self, heads: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.query = nn.Linear(WIDTH, heads * HEAD_DIM)
        self.key = nn.Linear(WIDTH, heads * HEAD_DIM)
        self.value = nn.Linear(WIDTH, heads * HEAD_DIM)
        self.out = nn.Linear(heads * HEAD_DIM, WIDTH)
        for name in ("heads", "scores", "mixed", "joined"):
            self.add_module(name, DummyModule())

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            layer(x).view(batch, tokens, -1, HEAD_DIM).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        q = self.heads(q)
        if self.how == "matmul":
            mixed = self.scores((q @ k.mT).softmax(-1)) @ v
        elif self.how == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
            mixed = torch.einsum("bhqk,bhkd->bhqd", self.scores(scores.softmax(-1)), v)
        else:  # heads and samples merged, as Bloom and Megatron do
            shape = q.shape
            q, k, v = (t.reshape(-1, tokens, HEAD_DIM) for t in (q, k, v))
            scores = torch.baddbmm(q.new_zeros(1), q, k.mT, beta=0.0)
            mixed = torch.bmm(self.scores(scores.softmax(-1)), v).view(shape)
        joined = self.joined(self.mixed(mixed).transpose(1, 2).reshape(batch, tokens, -1))
        return self.out(joined)


def _whole(heads: int, how: str) -> nn.Sequential:
    model = nn.Sequential(Attention(heads, how))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def _sharded(heads: int, how: str) -> nn.Sequential:
    model = _whole(heads, how)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    plan = dict.fromkeys(("query", "key", "value"), ColwiseParallel())
    parallelize_module(model[0], mesh, {**plan, "out": RowwiseParallel()})
    return model


def _mixing(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x + 0.5 * x.roll(1, -1) + x.mean()


def _same_as_one_process(
    heads: int, how: str, shape: tuple[int, int], mode: Callable[[], Any]
) -> None:
    x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(3))
    for site in ("query", "heads", "scores", "mixed", "joined", "out"):
        truth, seen = _whole(heads, how), []
        truth[0].get_submodule(site).register_forward_hook(
            lambda module, args, out, seen=seen: (
                seen.append(out.detach().clone()),
                _mixing(module, out, None, None),
            )[1]
        )
        due = truth(x).detach()
        what = f"{site}, {heads} heads, {how}, input {shape}"
        refusal = ""
        try:
            records, out = _hooked(heads, how, site, x, mode, hint=None)
        except LayoutError as error:
            refusal = str(error)
        if refusal:
            # A lone dim may leave several readings: they are named, and the hint settles it. What
            # was computed of them is refused and no more.
            assert 1 in (heads // dist.get_world_size(), *shape), what
            if "any of" not in refusal:
                continue
            records, out = _hooked(heads, how, site, x, mode, hint=seen[0].shape)
        for record in records[f"0.{site}"]:
            close(record, seen[0], f"record of {what}")
        close(out, due, f"output of {what}")


def _hooked(
    heads: int,
    how: str,
    site: str,
    x: Tensor,
    mode: Callable[[], Any],
    hint: tuple[int, ...] | None,
) -> tuple[Records, Tensor]:
    records: Records = {}
    with FlexModel(_sharded(heads, how), records, 2, keep="all") as flex, mode():
        flex.register_forward_hook(HookFunction(f"0.{site}", hint, editing_function=_mixing))
        for _ in range(2):
            out = flex(x)
    return records, out.detach()


@pytest.mark.parametrize("how", ["matmul", "einsum", "merged"])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (3, 1)], ids=str)
def test_attention_by_hand(how: str, heads: int, shape: tuple[int, int]) -> None:
    """Catches a head dim taken for another where a rank has one head, one sample or one token."""
    run_ranks(_same_as_one_process, 2, heads, how, shape, nullcontext, timeout=20)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_attention_by_hand_without_autograd(mode: Callable[[], Any]) -> None:
    """Catches the same where operations arrive undivided."""
    run_ranks(_same_as_one_process, 2, 4, "matmul", (3, 4), mode, timeout=20)
