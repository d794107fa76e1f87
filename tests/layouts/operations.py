"""The operations that propagation is held against: how they run, on what, cut how.

``known`` rows must be marked; of the others nothing need be claimed, but what is claimed must be
true. Every dim that is cut is divisible by 2 and by 3, but where a row names its number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from simulated_ranks import Operand, Program, values
from torch import Tensor

from flex_model.layouts.marks import TERM, WHOLE, Cut, Mark

__all__ = ["OPERATIONS", "Operation"]

SHAPE = (6, 12, 24)


@dataclass(frozen=True)
class Operation:
    """One row: a program, its operands, and whether its result must be known."""

    name: str
    program: Program
    operands: tuple[Operand, ...]
    known: bool = True
    ranks: tuple[int, ...] = (2, 3)

    def __str__(self) -> str:
        cuts = ", ".join(_spelled(mark) for _, mark in self.operands)
        on = "" if len(self.ranks) > 1 else f" on {self.ranks[0]}"
        return f"{self.name} [{cuts}]{on}"


def _spelled(mark: Mark) -> str:
    if not isinstance(mark, Cut):
        return mark.name
    return f"{mark.dim}" if mark.outer == 1 else f"{mark.dim}/{mark.outer}"


def _over_all_cuts(
    name: str,
    program: Program,
    passing: str,
    shape: tuple[int, ...] = SHAPE,
    scale: float = 1.0,
    dims: str = "0123",
) -> Iterator[Operation]:
    """One operand cut along each dim in turn; ``passing`` are the dims that must be known.

    ``dims`` leaves those out that the program does not run on, or gives other numbers of tensors.
    """
    for dim in (d for d in range(len(shape)) if str(d) in dims):
        operand = values(*shape) * scale
        yield Operation(name, program, ((operand, Cut(dim)),), str(dim) in passing)


def _row(name: str, program: Program, *operands: Operand, known: bool = True) -> Operation:
    return Operation(name, program, operands, known)


def _cut(dim: int, *shape: int, outer: int = 1, dtype: torch.dtype = torch.float32) -> Operand:
    return values(*shape, dtype=dtype), Cut(dim, outer)


def _whole(*shape: int, dtype: torch.dtype = torch.float32) -> Operand:
    return values(*shape, dtype=dtype), WHOLE


def _term(*shape: int) -> Operand:
    return values(*shape), TERM


def _views() -> Iterator[Operation]:
    for name, program in {
        "flatten": lambda x: x.flatten(),
        "view(-1)": lambda x: x.view(-1),
        "flatten the first two": lambda x: x.flatten(0, 1),
        "flatten the last two": lambda x: x.flatten(1),
        "unflatten the last": lambda x: x.unflatten(-1, (-1, 4)),
        "view of a view of a view": lambda x: x.view(-1, 24).view(-1).view(x.shape),
        "transpose": lambda x: x.transpose(0, -1),
        "mT": lambda x: x.mT,
        "permute": lambda x: x.permute(-1, 0, 1),
        "movedim": lambda x: x.movedim(0, 2),
        "swapaxes": lambda x: x.swapaxes(1, 2),
        "transposed, contiguous, viewed": lambda x: x.mT.contiguous().view(x.shape[0], -1),
        "transposed and reshaped": lambda x: x.transpose(0, 1).reshape(x.shape[1], -1),
        "unsqueeze": lambda x: x.unsqueeze(1),
        "unsqueeze from the end": lambda x: x.unsqueeze(-1),
        "None and slices": lambda x: x[:, None, :, None],
        "squeeze": lambda x: x[:, None].squeeze(1),
        "squeeze all": lambda x: x[None, :, None].squeeze(),
        "expand": lambda x: x[:, :, None].expand(-1, -1, 3, -1),
        "expand to new dims": lambda x: x.expand(5, *x.shape),
        "repeat along a new dim": lambda x: x.repeat(2, 1, 1, 1),
        "as another dtype's bits": lambda x: x.view(torch.int32),
        "complex and back": lambda x: torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        ),
    }.items():
        yield from _over_all_cuts(name, program, "012")
    yield from _over_all_cuts("slice", lambda x: x[:, 1:5], "02")
    yield from _over_all_cuts("slice with a step", lambda x: x[..., ::2], "01")
    yield from _over_all_cuts("select", lambda x: x[:, -1], "02")
    yield from _over_all_cuts("narrow", lambda x: x.narrow(2, 1, 2), "01")
    yield from _over_all_cuts("chunk", lambda x: x.chunk(2, 1), "02")
    yield from _over_all_cuts("split", lambda x: x.split(4, -1), "01", dims="01")
    yield from _over_all_cuts("split by sizes", lambda x: x.split([3, 5, 16], -1), "01", dims="01")
    yield from _over_all_cuts("tensor_split", lambda x: x.tensor_split(3, 1), "02")
    yield from _over_all_cuts("unbind", lambda x: x.unbind(1), "02", dims="02")
    yield from _over_all_cuts("unfold", lambda x: x.unfold(1, 2, 1), "02")
    yield from _over_all_cuts("repeat", lambda x: x.repeat(1, 1, 3), "01")
    yield from _over_all_cuts("repeat_interleave", lambda x: x.repeat_interleave(3, 1), "012")
    yield from _over_all_cuts("tile", lambda x: x.tile(1, 2, 1), "02")
    yield from _over_all_cuts("diagonal", lambda x: x.diagonal(dim1=1, dim2=2), "")
    yield from _over_all_cuts("flip", lambda x: x.flip(1), "")
    yield from _over_all_cuts("roll", lambda x: x.roll(1, 1), "")
    yield from _over_all_cuts("as_strided", lambda x: x.as_strided(x.shape, x.stride()), "")


def _reductions() -> Iterator[Operation]:
    both = {
        "sum": torch.sum,
        "mean": torch.mean,
        "amax": torch.amax,
        "var": torch.var,
        "std": torch.std,
        "norm": torch.linalg.vector_norm,
        "logsumexp": torch.logsumexp,
        "any": torch.any,
        "argmax": torch.argmax,
        "max": torch.max,
    }
    for name, reduce in both.items():

        def over_last(x: Tensor, reduce: Any = reduce) -> Any:
            return tuple(leaf) if isinstance(leaf := reduce(x, dim=-1), tuple) else leaf

        def kept(x: Tensor, reduce: Any = reduce) -> Any:
            return (
                tuple(leaf) if isinstance(leaf := reduce(x, dim=1, keepdim=True), tuple) else leaf
            )

        yield from _over_all_cuts(
            f"{name} of the last", over_last, "012" if name == "sum" else "01"
        )
        yield from _over_all_cuts(f"{name} kept", kept, "012" if name == "sum" else "02")
    yield from _over_all_cuts("sum of two dims", lambda x: x.sum((0, 2)), "012")
    yield from _over_all_cuts("mean of two dims", lambda x: x.mean((0, 2)), "1")
    yield from _over_all_cuts("sum of all", lambda x: x.sum(), "012")
    yield from _over_all_cuts("mean of all", lambda x: x.mean(), "")
    yield from _over_all_cuts("max of all", lambda x: x.max(), "")
    yield from _over_all_cuts("argmax of all", lambda x: x.argmax(), "")
    yield from _over_all_cuts("count_nonzero", lambda x: (x > 9).count_nonzero(-1), "")
    yield from _over_all_cuts("median", lambda x: tuple(x.median(-1)), "")
    yield from _over_all_cuts("var_mean", lambda x: torch.var_mean(x, -1), "")


def _along_one_dim() -> Iterator[Operation]:
    for name, program in {
        "softmax": lambda x: x.softmax(1),
        "log_softmax": lambda x: x.log_softmax(1),
        "cumsum": lambda x: x.cumsum(1),
        "cummax": lambda x: tuple(x.cummax(1)),
        "sort": lambda x: tuple(x.sort(1)),
        "stable sort": lambda x: tuple(x.sort(dim=1, stable=True, descending=True)),
        "argsort": lambda x: x.argsort(1),
        "topk": lambda x: tuple(x.topk(2, 1)),
        "topk by keywords": lambda x: tuple(torch.topk(x, k=2, dim=1)),
        "cat": lambda x: torch.cat([x, x + 1], 1),
        "index_select": lambda x: x.index_select(1, torch.tensor([1, 0])),
        "gather": lambda x: x.gather(1, torch.zeros_like(x, dtype=torch.long)),
        "take_along_dim": lambda x: x.take_along_dim(x.argsort(1), 1),
        "normalize": lambda x: F.normalize(x, dim=1),
        "diff": lambda x: x.diff(dim=1),
        "scatter": lambda x: torch.zeros_like(x).scatter(1, x.argmax(1, keepdim=True), 1.0),
    }.items():
        yield from _over_all_cuts(name, program, "02", scale=1e-3)
    for at in (0, 1, -1):

        def stacked(x: Tensor, at: int = at) -> Tensor:
            return torch.stack([x, x + 1], at)

        yield from _over_all_cuts(f"stack at {at}", stacked, "012")
    yield from _over_all_cuts(
        "half rotated",
        lambda x: torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1),
        "01",
    )
    yield from _over_all_cuts(
        "half rotated by chunk",
        lambda x: torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1),
        "01",
    )
    yield from _over_all_cuts("padded", lambda x: F.pad(x, (1, 0)), "01")
    yield from _over_all_cuts("padded in the midst", lambda x: F.pad(x, (0, 0, 1, 2)), "02")
    yield from _over_all_cuts("shifted by padding", lambda x: F.pad(x, (0, 0, 1, -1)), "02")
    yield from _over_all_cuts("tril", lambda x: x.tril(), "0")
    for name in ("kthvalue", "cumprod", "glu", "renorm"):

        def other(x: Tensor, name: str = name) -> Any:
            x = x * 1e-3
            if name == "glu":
                return F.glu(x, 1)
            if name == "renorm":
                return x.renorm(2, 1, 1.0)
            return tuple(x.kthvalue(1, 1)) if name == "kthvalue" else x.cumprod(1)

        yield from _over_all_cuts(name, other, "")
    for name, change in {
        "index_fill": lambda x: x.index_fill(1, torch.tensor([0]), 0.0),
        "index_add": lambda x: x.index_add(1, torch.tensor([0]), x.narrow(1, 1, 1)),
        "slice_scatter": lambda x: x.slice_scatter(x.narrow(1, 0, 1), 1, 1, 2),
        "index": lambda x: x[torch.tensor([0, 1])],
        "index by mask": lambda x: x[x > 30],
    }.items():
        yield from _over_all_cuts(name, change, "")


def _elementwise() -> Iterator[Operation]:
    for name, program in {
        "where": lambda x: torch.where(x > 9, x, -x),
        "where with a number": lambda x: torch.where(x > 9, x, torch.tensor(0.0)),
        "masked_fill": lambda x: x.masked_fill(x > 9, 0.0),
        "to half and back": lambda x: x.to(torch.float16).float(),
        "to bool": lambda x: x > 9,
        "integers": lambda x: x.long() % 5,
        "floor division": lambda x: x.long() // 2,
        "one-hot": lambda x: F.one_hot(x.long() % 5, 5),
        "gelu": F.gelu,
        "addcmul": lambda x: torch.addcmul(x, x, x),
        "lerp": lambda x: torch.lerp(x, 2 * x, 0.5),
        "clamp": lambda x: x.clamp(3, 20),
        "zeros_like": torch.zeros_like,
        "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True),
        "copied into a new tensor": lambda x: torch.empty_like(x).copy_(x),
        "copied and broadcast": lambda x: x.new_empty(3, *x.shape).copy_(x),
        "in place": lambda x: x.clone().mul_(2).add_(1).relu_(),
        "in place, masked": lambda x: x.clone().masked_fill_(x > 9, 0.0),
        "out=": lambda x: torch.mul(x, 2, out=torch.empty(x.shape)),
        "strided input": lambda x: x.mT.mul(2).mT,
    }.items():
        yield from _over_all_cuts(name, program, "012")
    yield from _over_all_cuts(
        "masked by its own rows", lambda x: x.masked_fill((x > 9)[..., :1].expand_as(x), 0.0), "01"
    )
    x, y = values(*SHAPE), values(24)
    yield _row("add a whole row", torch.add, (x, Cut(0)), (y, WHOLE))
    yield _row("add a cut row", torch.add, (x, Cut(2)), (y, Cut(0)))
    yield _row("add a column", torch.add, (x, Cut(1)), (values(12, 1), Cut(0)))
    yield _row("maximum", torch.max, (x, Cut(1)), (x * 2 % 7, Cut(1)))
    yield _row("two kinds of cut", torch.mul, (x, Cut(2, 2)), (y, Cut(0)), known=False)
    yield _row("broadcast apart", torch.add, _cut(0, 6, 1), (values(1, 6), WHOLE))


def _products() -> Iterator[Operation]:
    yield _row("linear", F.linear, _cut(0, 6, 12, 24), _whole(5, 24), _whole(5))
    yield _row("linear, second dim", F.linear, _cut(1, 6, 12, 24), _whole(5, 24), _whole(5))
    yield _row("linear, columns", F.linear, _whole(6, 12, 24), _cut(0, 12, 24), _cut(0, 12))
    yield _row("linear, rows", F.linear, _cut(2, 6, 12, 24), _cut(1, 5, 24))
    bias_on_each = (_cut(2, 6, 12, 24), _cut(1, 5, 24), _whole(5))
    yield _row("linear, rows, whole bias", F.linear, *bias_on_each, known=False)
    yield _row("linear of a matrix", F.linear, _cut(0, 6, 24), _whole(5, 24), _whole(5))
    yield _row(
        "linear of a transpose", lambda x, w: F.linear(x.mT, w), _cut(2, 6, 24, 12), _whole(5, 24)
    )
    yield _row("matmul", torch.matmul, _cut(0, 6, 4, 5), _cut(0, 6, 5, 3))
    yield _row("matmul, heads", torch.matmul, _cut(1, 2, 6, 4, 5), _cut(1, 2, 6, 5, 3))
    yield _row("matmul, one for all heads", torch.matmul, _cut(1, 2, 6, 4, 5), _whole(2, 1, 5, 3))
    yield _row("matmul, over the cut", torch.matmul, _cut(1, 4, 6), _cut(0, 6, 3))
    yield _row("matmul, in blocks", torch.matmul, _cut(1, 4, 12, outer=2), _cut(0, 12, 3, outer=2))
    unlike = (_cut(1, 4, 12, outer=2), _cut(0, 12, 3))
    yield _row("matmul, unlike blocks", torch.matmul, *unlike, known=False)
    yield _row("matmul, both sides", torch.matmul, _cut(0, 6, 4), _cut(1, 4, 6), known=False)
    yield _row("matmul of terms", torch.matmul, _term(4, 6), _whole(6, 3))
    yield _row("matmul of two terms", torch.matmul, _term(4, 6), _term(6, 3), known=False)
    yield _row("matrix times vector", torch.mv, _cut(0, 6, 4), _whole(4), known=False)
    yield _row("dot", torch.dot, _cut(0, 6), _cut(0, 6), known=False)
    yield _row("addmm", torch.addmm, _whole(5), _cut(0, 6, 8), _whole(8, 5))
    yield _row("addmm, rows", torch.addmm, _whole(5), _cut(1, 4, 6), _cut(0, 6, 5), known=False)
    scaled = lambda b, x, w: torch.addmm(b, x, w, beta=0.5, alpha=2.0)  # noqa: E731
    yield _row("addmm of terms", scaled, _term(4, 5), _cut(1, 4, 6), _cut(0, 6, 5))
    yield _row("baddbmm", torch.baddbmm, _cut(0, 6, 3, 3), _cut(0, 6, 3, 5), _cut(0, 6, 5, 3))
    yield _row(
        "baddbmm into nothing",
        lambda x: torch.baddbmm(torch.empty(x.shape[0], 4, 4), x, x.mT, beta=0),
        _cut(0, 6, 4, 5),
    )
    yield _row(
        "mm out=",
        lambda x, w: torch.mm(x, w, out=torch.empty(x.shape[0], 3)),
        _cut(0, 6, 4),
        _whole(4, 3),
    )
    for name, equation, left, right, known in [
        ("scores", "bqhd,bkhd->bhqk", _cut(2, 2, 3, 6, 5), _cut(2, 2, 3, 6, 5), True),
        ("values", "bhqk,bkhd->bqhd", _cut(1, 2, 6, 3, 3), _cut(2, 2, 3, 6, 5), True),
        ("heads out", "bshd,hdm->bsm", _cut(2, 2, 3, 6, 5), _cut(0, 6, 5, 4), True),
        ("linear", "bsh,oh->bso", _cut(0, 6, 3, 4), _whole(5, 4), True),
        ("columns", "bsh,oh->bso", _whole(2, 3, 4), _cut(0, 6, 4), False),
        ("experts", "ecm,emh->ech", _cut(0, 6, 4, 5), _cut(0, 6, 5, 3), True),
        ("outer", "bi,bj->bij", _cut(0, 6, 4), _cut(0, 6, 5), True),
    ]:

        def einsum(a: Tensor, b: Tensor, equation: str = equation) -> Tensor:
            return torch.einsum(equation, a, b)

        yield _row(f"einsum {name}", einsum, left, right, known=known)


def _layers() -> Iterator[Operation]:
    yield from _over_all_cuts("layer_norm", lambda x: F.layer_norm(x, x.shape[-1:]), "01")
    yield from _over_all_cuts("layer_norm of two", lambda x: F.layer_norm(x, x.shape[-2:]), "0")
    yield from _over_all_cuts("rms_norm", lambda x: F.rms_norm(x, x.shape[-1:]), "01")
    yield from _over_all_cuts("group_norm", lambda x: F.group_norm(x, 1), "0")
    yield from _over_all_cuts("conv1d", lambda x: F.conv1d(x, torch.ones(3, x.shape[1], 1)), "0")
    yield from _over_all_cuts(
        "batch_norm", lambda x: F.batch_norm(x, None, None, training=True), ""
    )
    yield from _over_all_cuts(
        "attention itself", lambda x: (x @ x.mT).softmax(-1) @ x, "0", scale=1e-4
    )
    yield from _over_all_cuts(
        "pooled", lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), "0", (6, 6, 6, 6)
    )
    ids = (values(6, 12, dtype=torch.long) % 5, Cut(0))
    yield _row("embedding", F.embedding, ids, _whole(5, 3))
    yield _row("embedding, second dim", F.embedding, (ids[0], Cut(1)), _whole(5, 3))
    yield _row("embedding, features", F.embedding, (ids[0], WHOLE), _cut(1, 5, 6))
    yield _row(
        "embedding, vocabulary",
        lambda i, w: F.embedding(i % 2, w),
        (ids[0], WHOLE),
        _cut(0, 6, 4),
        known=False,
    )
    heads, batch = _cut(1, 6, 6, 4, 5), _cut(0, 6, 6, 4, 5)
    sdpa = F.scaled_dot_product_attention
    causal = lambda q, k, v: sdpa(q, k, v, is_causal=True)  # noqa: E731
    masked = lambda q, k, v, m: sdpa(q, k, v, attn_mask=m)  # noqa: E731
    grouped = lambda q, k, v: sdpa(q, k, v, enable_gqa=True)  # noqa: E731
    yield _row("sdpa, heads", causal, heads, heads, heads)
    yield _row("sdpa, batch", causal, batch, batch, batch)
    yield _row("sdpa, masked", masked, heads, heads, heads, _whole(4, 4))
    yield _row("sdpa, masked by sample", masked, batch, batch, batch, _cut(0, 6, 1, 4, 4))
    dropped: Program = lambda q, k, v: sdpa(q, k, v, dropout_p=1e-12)  # noqa: E731
    yield _row("sdpa, dropout of nothing", dropped, heads, heads, heads)
    few = _cut(1, 2, 6, 4, 5)
    yield _row("sdpa, grouped", grouped, _cut(1, 2, 12, 4, 5), few, few)
    one = _whole(2, 1, 4, 5)
    yield _row("sdpa, one KV head", grouped, _cut(1, 2, 12, 4, 5), one, one)
    two = _whole(2, 2, 4, 5)
    yield _row("sdpa, all KV heads on each", grouped, _cut(1, 2, 12, 4, 5), two, two, known=False)
    yield _row(
        "repeated KV",
        lambda k: k[:, :, None].expand(-1, -1, 3, -1, -1).reshape(k.shape[0], -1, *k.shape[2:]),
        few,
    )
    table = (values(12, 8) * 0.01, WHOLE)
    yield _row(
        "rotary",
        lambda x, c: x * c.cos() + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * c.sin(),
        _cut(1, 2, 6, 12, 8),
        table,
    )
    yield _row(
        "heads in and out",
        lambda x: x.view(*x.shape[:2], -1, 4).transpose(1, 2).transpose(1, 2).reshape(x.shape),
        _cut(2, 2, 3, 24),
    )
    yield _row(
        "[gate | up]",
        lambda x: F.silu(x.unflatten(-1, (2, -1))[..., 0, :]) * x.unflatten(-1, (2, -1))[..., 1, :],
        _cut(2, 2, 3, 24, outer=2),
    )
    fused = lambda x: x.view(*x.shape[:-1], -1, 4).split([2, 1, 1], -1)  # noqa: E731
    yield _row("q, k and v by group", fused, _cut(2, 2, 3, 24))
    yield _row(
        "class token",
        lambda x, c: torch.cat([c.expand(x.shape[0], -1, -1), x], 1),
        _cut(0, 6, 4, 5),
        _whole(1, 1, 5),
    )
    yield _row(
        "log-probability",
        lambda x, i: x.log_softmax(-1).gather(-1, i[..., None] % 6).squeeze(-1),
        _cut(0, 6, 12, 6),
        ids,
    )
    yield _row("router", lambda x: tuple(x.softmax(-1).topk(2)), _cut(0, 6, 12))


def _terms() -> Iterator[Operation]:
    """Sums of terms stay so under linear maps only."""
    linear: dict[str, Program] = {
        "scaled": lambda x: x * 2,
        "scaled from the left": lambda x: 2 * x,
        "divided": lambda x: x / 2,
        "negated": lambda x: -x,
        "added to itself": lambda x: x + x,
        "to double": lambda x: x.double(),
        "viewed": lambda x: x.view(-1).unsqueeze(0),
        "transposed": lambda x: x.mT.contiguous(),
        "sliced": lambda x: x[1:, ::2],
        "cumulated": lambda x: x.cumsum(1),
        "copied": lambda x: torch.empty_like(x).copy_(x),
    }
    crooked: dict[str, Program] = {
        "plus a number": lambda x: x + 1,
        "minus a number": lambda x: x - 3,
        "plus a number, in place": lambda x: x.clone().add_(1),
        "from a number": lambda x: 1 - x,
        "to bool": lambda x: x.bool(),
        "to integers": lambda x: (x * 0.4).long(),
        "divided and floored": lambda x: torch.div(x, 3, rounding_mode="floor"),
        "softmax": lambda x: (x / 9).softmax(-1),
        "log_softmax": lambda x: (x / 9).log_softmax(-1),
        "sorted": lambda x: x.sort().values,
        "topk": lambda x: tuple(x.topk(2)),
        "cummax": lambda x: tuple(x.cummax(1)),
        "padded with ones": lambda x: F.pad(x, (1, 1), value=1.0),
        "relu": torch.relu,
        "squared": torch.square,
        "masked_fill": lambda x: x.masked_fill(torch.ones(4, 6) > 0, 3.0),
        "where": lambda x: torch.where(x > 3, x, 0.0),
        "max": lambda x: x.max(),
        "argmax": lambda x: x.argmax(-1),
        "layer_norm": lambda x: F.layer_norm(x, (6,)),
        "any": lambda x: x.any(),
    }
    for name, program in linear.items():
        yield _row(f"terms {name}", program, _term(4, 6))
    for name, program in crooked.items():
        yield _row(f"terms {name}", program, _term(4, 6), known=False)
    yield _row("terms times a row", torch.mul, _term(4, 6), _whole(6))
    yield _row("a row times terms", torch.mul, _whole(6), _term(4, 6))
    yield _row("terms plus terms", torch.add, _term(4, 6), _term(6))
    yield _row("terms plus a row", torch.add, _term(4, 6), _whole(6), known=False)
    yield _row("a row over terms", torch.div, _whole(6), _term(4, 6), known=False)
    yield _row("terms times terms", torch.mul, _term(4, 6), _term(4, 6), known=False)


def _small_parts() -> Iterator[Operation]:
    """One sample, one head or one token to a rank: local dims of length 1, which views confuse."""
    for ranks in (2, 3):
        yield from (replace(row, ranks=(ranks,)) for row in _one_to_a_rank(ranks))


def _one_to_a_rank(n: int) -> Iterator[Operation]:
    flat: Program = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    head: Program = lambda x: x.view(x.shape[0], x.shape[1], -1, 4).transpose(1, 2)  # noqa: E731
    back: Program = lambda x: x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)  # noqa: E731
    merged: Program = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    attention: Program = lambda q: (q @ q.mT).softmax(-1) @ q  # noqa: E731
    yield _row("tokens, batch first", flat, _cut(0, n, 3, 4))
    yield _row("tokens, sequence first", flat, _cut(1, 3, n, 4))
    yield _row("tokens, one to a rank", flat, _cut(1, 1, n, 4))
    yield _row("tokens and back", lambda x: flat(x).view(x.shape), _cut(1, 3, n, 4))
    yield _row("linear, batch first", F.linear, _cut(0, n, 3, 4), _whole(5, 4))
    yield _row("linear, sequence first", F.linear, _cut(1, 3, n, 4), _whole(5, 4), _whole(5))
    yield _row("linear of one head", F.linear, _cut(1, 1, n, 3, 4), _whole(5, 4))
    yield _row("into one head", head, _cut(2, 2, 3, 4 * n))
    yield _row("one token into one head", head, _cut(2, 2, 1, 4 * n))
    yield _row("out of one head", back, _cut(1, 2, n, 3, 4))
    yield _row("batch and one head merged", merged, _cut(1, 2, n, 3, 4))
    yield _row("one sample and heads merged", merged, _cut(0, n, 2, 3, 4))
    yield _row("attention of one head", attention, _cut(1, 2, n, 3, 4))
    yield _row("attention of one sample", attention, _cut(0, n, 2, 3, 4))
    yield _row("one KV head repeated", lambda k: k.repeat_interleave(2, 1), _cut(1, 2, n, 3, 4))
    yield _row("one feature", F.linear, _whole(2, 3, 4), _cut(0, n, 4))
    yield _row("megatron's scores, one head", _megatron_scores, _cut(2, 3, 2, n, 5))
    yield _row("megatron's scores, one sample", _megatron_scores, _cut(1, 3, n, 2, 5))
    for name, program, operand in [
        ("a leading one added", lambda x: x.view(1, *x.shape), _cut(0, 2 * n, 4)),
        ("packed into one row", lambda x: x.reshape(1, -1, 4), _cut(0, 2 * n, 3, 4)),
        ("a one in the midst", lambda x: x.view(x.shape[0], 1, -1), _cut(1, 3, 2 * n)),
    ]:
        yield _row(name, program, operand, known=False)


def _megatron_scores(q: Tensor) -> Tensor:
    """[sequence, batch, heads, width] to [batch, heads, sequence, sequence], by its own views."""
    flat = q.reshape(q.shape[0], q.shape[1] * q.shape[2], -1).transpose(0, 1)
    buffer = torch.empty(flat.shape[0], q.shape[0], q.shape[0])
    scores = torch.baddbmm(buffer, flat, flat.transpose(1, 2), beta=0.0)
    return scores.view(q.shape[1], q.shape[2], q.shape[0], q.shape[0])


OPERATIONS: dict[str, tuple[Operation, ...]] = {
    "views": tuple(_views()),
    "reductions": tuple(_reductions()),
    "along one dim": tuple(_along_one_dim()),
    "elementwise": tuple(_elementwise()),
    "products": tuple(_products()),
    "layers": tuple(_layers()),
    "terms": tuple(_terms()),
    "small parts": tuple(_small_parts()),
}
