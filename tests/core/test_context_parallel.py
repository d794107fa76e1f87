"""Sequences cut over context-parallel ranks: what hooks see is in the order of positions.

The truth is one process on whole sequences, with torch's own hooks. Attention over ranks is in the
parity grid; here tokens are flattened, batches and sequences change, and bad input is refused.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import close
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from flex_model import FlexModel, HookFunction
from flex_model.errors import ConfigurationError, LayoutError, RankDisagreementError
from flex_model.testing.ranks import run_ranks

WIDTH = 6
SITES = ("", "samples_first", "positions_first", "act", "table")


class Flattened(nn.Module):
    """Tokens in a row as ``[batch * sequence]`` and as ``[sequence * batch]``, and one weight each
    of a table of whole positions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.samples_first = nn.Linear(WIDTH, WIDTH)
        self.positions_first = nn.Linear(WIDTH, WIDTH)
        self.act = nn.GELU()
        self.table = nn.Embedding(99, WIDTH)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        batch, sequence, _ = x.shape
        y = self.act(self.samples_first(x.flatten(0, 1))).view(x.shape)
        z = self.positions_first(y.transpose(0, 1).reshape(-1, WIDTH))
        return z.view(sequence, batch, WIDTH).transpose(0, 1) + x * self.table(positions)


def _data(batch: int, sequence: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + 31 * sequence)
    x = torch.randn(batch, sequence, WIDTH, generator=generator)
    return x, torch.arange(sequence).expand(batch, sequence)


def _part(whole: Tensor, rank: int, ranks: int, order: str = "zigzag") -> Tensor:
    """What a rank holds of whole sequences along dim 1."""
    if order == "contiguous":
        return whole.chunk(ranks, 1)[rank].contiguous()
    chunks = whole.chunk(2 * ranks, 1)
    return torch.cat([chunks[rank], chunks[-1 - rank]], 1)


def _mixing(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x + x.roll(1, 0) * 0.5 + x.cumsum(0) * 0.1


def _weights(like: Tensor) -> Tensor:
    """Of the loss: another one for each entry of the whole output."""
    return torch.linspace(-1, 1, like.numel()).view(like.shape)


def _truth(site: str, whole: tuple[Tensor, Tensor], edited: bool) -> dict[str, Tensor]:
    model, seen = Flattened(), []
    x = whole[0].clone().requires_grad_()

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        seen.append(out.detach().clone())
        return _mixing(module, out, None, None) if edited else None

    model.get_submodule(site).register_forward_hook(hook)
    out = model(x, whole[1])
    (out * _weights(out)).mean().backward()
    assert x.grad is not None
    weight = model.samples_first.weight.grad
    assert weight is not None
    return {"record": seen[0], "out": out.detach(), "grad": x.grad, "weight": weight}


def _same_as_one_process(sizes: dict[str, int], order: str, lengths: list[tuple[int, int]]) -> None:
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    dp, cp = sizes.get("dp", 1), sizes["cp"]
    dp_rank = mesh.get_local_rank("dp") if "dp" in sizes else 0
    cp_rank = mesh.get_local_rank("cp")

    def part(whole: Tensor) -> Tensor:
        return _part(whole.chunk(dp)[dp_rank], cp_rank, cp, order)

    for site in SITES:
        for edited in (False, True):
            records: dict[str, list[Tensor]] = {}
            options: dict[str, Any] = {"context_order": order, "keep": "all"}
            flex = FlexModel(Flattened(), records, 1, 1, dp, context_parallel_size=cp, **options)
            with flex:
                edit = _mixing if edited else None
                flex.register_forward_hook(HookFunction(site, editing_function=edit))
                for batch, sequence in lengths:
                    what = f"{site!r}, {(batch, sequence)}, edited {edited}"
                    whole = _data(batch, sequence)
                    due = _truth(site, whole, edited)
                    x = part(whole[0]).requires_grad_()
                    out = flex(x, part(whole[1]))
                    (out * part(_weights(due["out"]))).mean().backward()
                    close(records[site].pop(), due["record"], f"record of {what}")
                    close(out, part(due["out"]), f"output of {what}")
                    close(x.grad, part(due["grad"]) * cp * dp, f"input gradient of {what}")


LENGTHS = [(1, 8), (2, 8), (2, 12), (4, 8), (1, 4), (2, 8)]


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_hooks_see_whole_sequences(order: str) -> None:
    """Catches chunks joined in the order of ranks, blocks of flattened tokens counted on a first
    forward of another length, and gradients that are not of the ranks' mean loss.
    """
    run_ranks(_same_as_one_process, 2, {"cp": 2}, order, LENGTHS)


def test_of_several_batches() -> None:
    """Catches the blocks of one mesh dim counted before the other's parts are joined."""
    run_ranks(_same_as_one_process, 4, {"dp": 2, "cp": 2}, "zigzag", [(4, 8), (6, 4), (4, 8)])


def _given_a_mesh() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    whole = _data(2, 8)
    parts = [_part(x, dist.get_rank(), 2) for x in whole]
    due = _truth("act", whole, edited=False)["record"]
    for options in ({}, {"placements": {"cp": Shard(0)}}):
        records: dict[str, list[Tensor]] = {}
        with FlexModel(Flattened(), records, mesh=mesh, keep="all") as flex:
            flex.register_forward_hook(HookFunction("table", **options))
            flex(*parts)
        # Told so, the batch is what context ranks share out: two samples are two chunks.
        sizes = (4, 4) if options else (2, 8)
        assert records["table"][0].shape == (*sizes, WIDTH)
    records = {}
    with FlexModel(Flattened(), records, mesh=mesh, keep="all") as flex:
        flex.register_forward_hook(HookFunction("act", expected_shape=(16, None)))
        flex(*parts)
    close(records["act"][0], due, "with a hint and a mesh")


def test_a_given_mesh_and_hints() -> None:
    """Catches a mesh dim that hints cannot name."""
    run_ranks(_given_a_mesh, 2)


def _parameters() -> None:
    whole = _data(2, 8)
    due = _truth("act", whole, edited=False)["weight"]
    seen = []

    def keep(module: nn.Module, gradient: Tensor, save_ctx: Any, modules: Any) -> Tensor:
        seen.append(gradient.detach().clone())
        return gradient

    with FlexModel(Flattened(), {}, context_parallel_size=2) as flex:
        flex.register_hook(HookFunction("samples_first.weight", editing_function=keep))
        x, positions = (_part(each, dist.get_rank(), 2) for each in whole)
        out = flex(x, positions)
        weights = _part(_weights(whole[0]), dist.get_rank(), 2)
        (out * weights).mean().backward()
    close(seen[0], due, "the gradient of a weight")


def test_the_gradient_of_a_parameter() -> None:
    """Catches the gradient of one rank's positions shown as the whole sequence's."""
    run_ranks(_parameters, 2)


def _fully_sharded(sizes: dict[str, int]) -> None:
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    model = Flattened()
    names = dict(model.named_parameters())
    fully_shard(model)
    dp, whole = sizes.get("dp", 1), _data(4, 8)
    due = _truth("act", whole, edited=True)
    dp_rank = mesh.get_local_rank("dp") if "dp" in sizes else 0
    parts = [_part(x.chunk(dp)[dp_rank], mesh.get_local_rank("cp"), 2) for x in whole]
    weights = _part(_weights(due["out"]).chunk(dp)[dp_rank], mesh.get_local_rank("cp"), 2)
    records: dict[str, list[Tensor]] = {}
    options: dict[str, Any] = {"context_parallel_size": 2, "keep": "all"}
    with FlexModel(model, records, data_parallel_size=dp, **options) as flex:
        flex.register_forward_hook(HookFunction("act", editing_function=_mixing))
        (flex(*parts) * weights).mean().backward()
        for name, shape in ((name, value.shape) for name, value in names.items()):
            assert flex.get_module_parameter(name).shape == shape
    close(records["act"][0], due["record"], "record")
    gradient = model.samples_first.weight.grad
    assert isinstance(gradient, DTensor)
    close(gradient.full_tensor(), due["weight"], "the gradient of a weight")


@pytest.mark.parametrize("sizes", [{"cp": 2}, {"dp": 2, "cp": 2}], ids=str)
def test_parameters_cut_over_context_ranks_too(sizes: dict[str, int]) -> None:
    """Catches the ranks of fully sharded parameters taken for those with a batch each."""
    run_ranks(_fully_sharded, 2 * sizes.get("dp", 1), sizes)


# -- what is refused ---------------------------------------------------------------------------


def _refused(sequences: tuple[int, int], error: type[Exception], words: str) -> None:
    with FlexModel(Flattened(), {}, context_parallel_size=2) as flex:
        flex.register_forward_hook(HookFunction("act"))
        with pytest.raises(error, match=words):
            flex(*_data(2, sequences[dist.get_rank()]))
        flex(*_data(2, 4))  # nobody is left waiting


@pytest.mark.parametrize(
    ("sequences", "error", "words"),
    [
        ((3, 3), LayoutError, r"Rank \d was given 3 entries.*multiple of 4.*contiguous"),
        ((4, 6), RankDisagreementError, r"shape besides the batch.*Pad"),
    ],
)
def test_parts_of_a_sequence_that_do_not_fit(
    sequences: tuple[int, int], error: type[Exception], words: str
) -> None:
    """Catches a chunk cut in two, and ranks whose parts are not equally long, before the model
    runs: gloo ends the process on an all-gather of such parts.
    """
    run_ranks(_refused, 2, sequences, error, words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FlexModel(nn.Identity(), {}, context_order="zig"), "context_order must be"),
        (lambda: FlexModel(nn.Identity(), {}, context_parallel_size=0), "cp size must be"),
        (lambda: FlexModel(nn.Identity(), {}, context_parallel_size=2), "cp=2.*no process group"),
    ],
)
def test_options_that_do_not_fit(make: Callable[[], FlexModel], words: str) -> None:
    """Catches a slip of the pen that would be taken for the other order."""
    with pytest.raises(ConfigurationError, match=words):
        make()


def _same_dim_twice() -> None:
    with pytest.raises(ConfigurationError, match="batch_dim and sequence_dim are both 1"):
        FlexModel(nn.Identity(), {}, context_parallel_size=2, batch_dim=1)
    FlexModel(nn.Identity(), {}, context_parallel_size=2, batch_dim=1, sequence_dim=0).restore()


def test_batch_and_sequence_on_one_dim() -> None:
    """Catches a batch that is cut as if it were the sequence."""
    run_ranks(_same_dim_twice, 2)
