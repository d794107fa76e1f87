"""Where the batch lies, found without a hint: models that move, merge, add and drop the batch dim.

Each rank runs the whole model on its part of the batch; the truth is one process with torch's own
hooks on the whole batch.
"""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import close
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from flex_model import FlexModel, HookFunction
from flex_model.errors import LayoutError
from flex_model.testing.ranks import RankFailure, run_ranks

WIDTH, TOKENS = 6, 5

Records = dict[str, list[Tensor]]


def _filled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model.eval()


class Vision(nn.Module):
    """A class token and queries that grow with the batch, though nothing of the input is in them
    yet; a table of positions that does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Embedding(TOKENS + 1, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.pooled = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(x.shape[0], -1, -1)
        x = torch.cat([token, x], 1) + self.positions(torch.arange(TOKENS + 1))
        return self.pooled(self.norm(x)[:, 0])


class Queries(nn.Module):
    """Learned queries go through a layer of their own before they meet the input."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(3, WIDTH))
        self.project = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.project(self.queries.expand(x.shape[0], -1, -1))
        return self.out((queries @ x.mT).softmax(-1) @ x)


class SequenceFirst(nn.Module):
    """``[sequence, batch, width]``, as torch's own attention has it, with tokens flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.norm = nn.LayerNorm(WIDTH)
        self.router = nn.Linear(WIDTH, 4)
        self.expert = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        flat = x.reshape(-1, WIDTH)
        chosen = self.router(flat).softmax(-1).amax(-1, keepdim=True)
        return (self.expert(flat) * chosen).view(x.shape)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(WIDTH, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.act = nn.ReLU()
        self.head = nn.Linear(8 * TOKENS, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.norm(self.stem(x.mT))).flatten(1))


class Llama(nn.Module):
    """A transformers model; ``heads`` is the number of its heads."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_key_value_heads=1,
        )
        self.model = LlamaModel(config)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.sum(-1).abs() * 100).long() % 11
        out = self.model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return out.last_hidden_state


LLAMA_SITES = (
    ("model.embed_tokens", 0),
    ("model.rotary_emb", 0),
    ("model.layers.0.self_attn.q_proj", 0),
    ("model.layers.0.self_attn", 0),
    ("model.layers.0.mlp.act_fn", 0),
    ("model.norm", 0),
)

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[str, int], ...], int]] = {
    "vision": (Vision, (("positions", 0), ("norm", 0), ("pooled", 0)), 0),
    "sequence first": (
        SequenceFirst,
        (("attention", 0), ("norm", 0), ("router", 0), ("expert", 0), ("", 0)),
        1,
    ),
    "convolution": (Convolution, (("stem", 0), ("norm", 0), ("act", 0), ("head", 0)), 0),
    "llama": (Llama, LLAMA_SITES, 0),
}


def _mixing(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x + x.roll(1, 0) * 0.5 + x.softmax(-1)


def _input(batch: int, batch_dim: int) -> Tensor:
    x = torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(4))
    return x.transpose(0, batch_dim).contiguous()


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _truth(make: Callable[[], nn.Module], site: str, x: Tensor, edited: bool) -> tuple[Any, Tensor]:
    model, seen = _filled(make()), []

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        seen.append(_first(out).detach().clone())
        if not edited:
            return None
        new = _mixing(module, _first(out), None, None)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    model.get_submodule(site).register_forward_hook(hook)
    return model(x).detach(), seen[0]


def _same_as_one_process(name: str, sizes: tuple[int, int], mode: Any) -> None:
    make, sites, batch_dim = MODELS[name]
    whole = _input(sum(sizes), batch_dim)
    part = whole.split(sizes, batch_dim)[dist.get_rank()].contiguous()
    for site, index in sites:
        for edited in (False, True):
            due_out, due = _truth(make, site, whole, edited)
            records: Records = {}
            options: dict[str, Any] = {"keep": "all", "batch_dim": batch_dim}
            flex = FlexModel(_filled(make()), records, data_parallel_size=2, **options)
            edit = _mixing if edited else None
            with flex, mode():
                flex.register_forward_hook(HookFunction(site, None, edit, index))
                for _ in range(2):
                    out = flex(part)
            what = f"{name}, {site}, batches {sizes}, edited {edited}"
            for record in records[site]:
                close(record, due, f"record of {what}")
            grows = due_out.shape[0] == sum(sizes)
            due_part = due_out.split(sizes, 0 if grows else batch_dim)[dist.get_rank()]
            close(out, due_part, f"output of {what}")


FOUND = [
    (name, sizes)
    for name in MODELS
    for sizes in ((2, 2), (1, 1), (3, 1))
    if (name, sizes) != ("sequence first", (1, 1))
]


def test_a_lone_sample_between_two_dims_is_refused_by_name() -> None:
    """Catches a guess: `[sequence, 1, width]` folded and viewed again has the batch in one of three
    places on every rank alike.
    """
    with pytest.raises(RankFailure, match="local shapes leave open which of"):
        run_ranks(_same_as_one_process, 2, "sequence first", (1, 1), nullcontext, timeout=20)


@pytest.mark.parametrize(("name", "sizes"), FOUND, ids=str)
def test_the_batch_is_found_without_a_hint(name: str, sizes: tuple[int, int]) -> None:
    """Catches samples joined along another dim: a batch of one to a rank leaves open which dim it
    is, and a value that does not grow with the batch must not be doubled.
    """
    run_ranks(_same_as_one_process, 2, name, sizes, nullcontext, timeout=20)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", MODELS)
def test_however_it_runs(name: str, mode: Any) -> None:
    """Catches layouts that are found with autograd only: inference mode hands over operations that
    autograd breaks down.
    """
    run_ranks(_same_as_one_process, 2, name, (2, 2), mode, timeout=20)


def _learned_queries(sizes: tuple[int, int]) -> None:
    whole = _input(sum(sizes), 0)
    part = whole.split(sizes)[dist.get_rank()]
    _, due = _truth(Queries, "project", whole, edited=False)
    records: Records = {}
    with FlexModel(_filled(Queries()), records, data_parallel_size=2, keep="all") as flex:
        flex.register_forward_hook(HookFunction("project"))
        try:
            flex(part)
        except LayoutError as error:
            assert "project" in str(error)  # noqa: PT017 - to say so is right as well
        else:
            close(records["project"][0], due, f"queries, batches {sizes}")
    # Downstream of the input it is a matter of course.
    due_out, due = _truth(Queries, "out", whole, edited=True)
    with FlexModel(_filled(Queries()), {}, data_parallel_size=2) as flex:
        flex.register_forward_hook(HookFunction("out", editing_function=_mixing))
        close(flex(part), due_out.split(sizes)[dist.get_rank()], "output")


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1)], ids=str)
def test_a_value_that_grows_with_the_batch_before_it_meets_the_input(
    sizes: tuple[int, int],
) -> None:
    """Catches one rank's queries recorded as if they were all: they are alike on every rank, yet
    one process has them for every sample; with ragged batches the ranks do not even hold equally
    many. To refuse, and ask for a hint, is right as well.
    """
    run_ranks(_learned_queries, 2, sizes, timeout=20)


def _statistics() -> None:
    class Statistics(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.summed = nn.Identity()
            self.mean = nn.Identity()
            self.shifted = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.shifted(x.sum(0) + 1)
            return x - self.mean(x.mean(0)) + self.summed(x.sum(0))

    whole = _input(4, 0)
    part = whole.chunk(2)[dist.get_rank()]
    records: Records = {}
    with FlexModel(Statistics(), records, data_parallel_size=2, keep="all") as flex:
        flex.register_forward_hook(HookFunction("summed"))
        flex(part)
    close(records["summed"][0], whole.sum(0), "a sum over the batch")
    for site in ("mean", "shifted"):
        with FlexModel(Statistics(), {}, data_parallel_size=2) as flex:
            flex.register_forward_hook(HookFunction(site))
            with pytest.raises(LayoutError, match=site):
                flex(part)


def test_statistics_over_the_batch() -> None:
    """Catches each rank's own statistics shown as the whole batch's: a sum is completed, and what
    cannot be completed is refused.
    """
    run_ranks(_statistics, 2)


def _changing_sizes() -> None:
    for name in ("sequence first", "llama"):
        make, sites, batch_dim = MODELS[name]
        records: Records = {}
        options: dict[str, Any] = {"keep": "all", "batch_dim": batch_dim}
        flex = FlexModel(_filled(make()), records, data_parallel_size=2, **options)
        with flex:
            for site, _ in sites:
                flex.register_forward_hook(HookFunction(site))
            for sizes in [(2, 2), (3, 1), (1, 1), (1, 4), (2, 2)]:
                records.clear()
                whole = _input(sum(sizes), batch_dim)
                flex(whole.split(sizes, batch_dim)[dist.get_rank()].contiguous())
                for site, _ in sites:
                    _, due = _truth(make, site, whole, edited=False)
                    close(records[site][0], due, f"{name}, {site}, then batches {sizes}")


def test_batches_of_other_sizes_later() -> None:
    """Catches sizes remembered from the first forward."""
    run_ranks(_changing_sizes, 2)


@dataclasses.dataclass
class Batch:
    x: Tensor


class TakesBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 4)

    def forward(self, batch: Batch) -> Tensor:
        return self.layer(batch.x)


class TakesIds(nn.Module):
    """One number per sample, as recommenders have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(9, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(ids)


class TakesPositions(nn.Module):
    """The first tensor is no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 4)

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        return self.layer(x + positions[None, :, None])


def _input_of(name: str, x: Tensor) -> tuple[nn.Module, tuple[Any, ...]]:
    if name == "dataclass":
        return _filled(TakesBatch()), (Batch(x),)
    if name == "ids":
        return _filled(TakesIds()), ((x[:, 0, 0] * 100).long().abs() % 9,)
    return _filled(TakesPositions()), (torch.arange(float(TOKENS)), x)


def _inputs_of_other_kinds(name: str) -> None:
    whole = _input(4, 0)
    model, args = _input_of(name, whole)
    due = model(*args)
    for sizes in ({"data_parallel_size": 2}, {"tensor_parallel_size": 2}):
        records: Records = {}
        part = whole.chunk(2)[dist.get_rank()] if "data_parallel_size" in sizes else whole
        model, args = _input_of(name, part)
        with FlexModel(model, records, keep="all", **sizes) as flex:
            flex.register_forward_hook(HookFunction("layer"))
            for _ in range(2):
                flex(*args)
        for record in records["layer"]:
            close(record, due, f"{name}, {sizes}")


@pytest.mark.parametrize("name", ["dataclass", "ids", "positions first"])
def test_inputs_of_other_kinds(name: str) -> None:
    """Catches a batch looked for in the first plain tensor of two dims or more alone."""
    run_ranks(_inputs_of_other_kinds, 2, name, timeout=20)


def _the_model_itself() -> None:
    whole = _input(4, 0)
    due = _filled(Convolution())(whole)
    for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
        records: Records = {}
        model = _filled(Convolution())
        with FlexModel(model, records, data_parallel_size=2, keep="all") as flex:
            flex.register_forward_hook(HookFunction("act"))
            getattr(flex, f"register_{kind}_hook")(HookFunction(""))
            part = whole.chunk(2)[dist.get_rank()].clone().requires_grad_()
            flex(part).sum().backward()
        output = kind in ("forward", "full_backward_pre")
        assert records[""][0].shape == (due.shape if output else whole.shape), kind
        if kind == "forward":
            close(records[""][0], due, "the model's output")
        if kind == "forward_pre":
            close(records[""][0], whole, "the model's input")


def test_the_wrapped_model_itself_is_hooked_after_its_layers() -> None:
    """Catches a hook on the root that runs when the forward is already taken for ended."""
    run_ranks(_the_model_itself, 2)
