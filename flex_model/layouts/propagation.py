"""How a mark passes through one ATen operation, on local tensors.

torch's own DTensor has such rules for tensors that know their whole shape. Inside framework and
user code there are only local tensors and local sizes (``view(b, s, local_heads, d)``), so the
rules here are stated on those. An operation without a rule gives ``UNKNOWN`` if anything cut flows
into it: never a guess.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flex_model.layouts.marks import (
    FOREIGN,
    TERM,
    UNKNOWN,
    WHOLE,
    Cut,
    Mark,
    OneOf,
    one_of,
    reviewed,
)

__all__ = ["Call", "has_rule", "propagate"]


@dataclass(frozen=True)
class Call:
    """One operation as it ran, and what one mesh dim does to each of its tensor operands."""

    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    operands: Sequence[tuple[Tensor, Mark]]
    out: Tensor

    @property
    def name(self) -> str:
        return self.func.overloadpacket.__name__

    def argument(self, position: int, name: str, default: Any) -> Any:
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def dims(self, position: int, name: str = "dim") -> tuple[int, ...]:
        """A dim argument of the first operand, normalised; all dims where none is given."""
        ndim = max(self.operands[0][0].ndim, 1)
        given = self.argument(position, name, None)
        if given is None or (isinstance(given, (list, tuple)) and not given):
            return tuple(range(ndim))
        dims = given if isinstance(given, (list, tuple)) else [given]
        return tuple(d % ndim for d in dims)


Rule = Callable[[Call], Mark]


def propagate(call: Call) -> Mark:
    """The mark of `call.out` over one mesh dim.

    Whole operands give whole results whatever the operation; unknown ones poison. Where an operand
    is cut in one of several ways, those stay under which the operation makes sense.
    """
    open_marks = [mark.cuts if isinstance(mark, OneOf) else (mark,) for _, mark in call.operands]
    if math.prod(len(marks) for marks in open_marks) > _MOST_COMBINATIONS:
        return UNKNOWN
    tensors = [tensor for tensor, _ in call.operands]
    found = [
        _propagate_one(replace(call, operands=list(zip(tensors, marks, strict=True))))
        for marks in itertools.product(*open_marks)
    ]
    return found[0] if len(found) == 1 else one_of(found)


def _holds_copies(call: Call) -> bool:
    """Whether a lone entry was repeated: as often on a shard as the shard needs, so it fits any."""
    repeats = call.name in ("expand", "repeat")
    return repeats and call.out.numel() > call.operands[0][0].numel()


def has_rule(func: Any) -> bool:
    """Whether an operation is followed as it is."""
    return func.overloadpacket.__name__ in _RULES or torch.Tag.pointwise in func.tags


def _propagate_one(call: Call) -> Mark:
    if call.name in _OVERWRITING:  # what was there before has no say
        call = replace(call, operands=call.operands[1:])
    marks = [mark for _, mark in call.operands]
    if UNKNOWN in marks:
        return UNKNOWN
    if not any(isinstance(mark, Cut) or mark is TERM for mark in marks):
        return FOREIGN if FOREIGN in marks or _holds_copies(call) else WHOLE
    if TERM in marks and call.name not in _LINEAR:
        return UNKNOWN
    rule = _RULES.get(call.name)
    if rule is None:
        rule = pointwise if torch.Tag.pointwise in call.func.tags else _unknown
    mark = rule(call)
    if isinstance(mark, Cut) and not 0 <= mark.dim < call.out.ndim:
        return UNKNOWN
    return mark


def _unknown(call: Call) -> Mark:
    return UNKNOWN


def _merged(marks: Sequence[Mark]) -> Mark:
    """Operands that must agree: the cut they share, UNKNOWN where they differ."""
    cuts = {mark for mark in marks if isinstance(mark, Cut)}
    if any(mark in (TERM, UNKNOWN) for mark in marks) or len(cuts) > 1:
        return UNKNOWN
    return cuts.pop() if cuts else WHOLE


def pointwise(call: Call) -> Mark:
    """Operands broadcast against each other; sums of terms stay terms only under linear ones."""
    operands = call.operands
    marks = [mark for _, mark in operands]
    if TERM in marks:
        return _linear(call, marks)
    return _merged(
        [
            Cut(mark.dim + call.out.ndim - operand.ndim, mark.outer)
            if isinstance(mark, Cut)
            else mark
            for operand, mark in operands
        ]
    )


def _linear(call: Call, marks: Sequence[Mark]) -> Mark:
    """Sums of terms are terms, and so are terms times (or over) what is whole: nothing else."""
    name = call.name.rstrip("_")
    if name in ("mul", "div"):
        rounded = call.kwargs.get("rounding_mode") is not None
        numerator = marks[0] is TERM or name == "mul"
        others = list(marks)
        others.remove(TERM)
        fits = numerator and not rounded and all(mark in (WHOLE, FOREIGN) for mark in others)
        return TERM if fits else UNKNOWN
    if name in ("add", "sub"):  # a number would be added once on every rank
        return TERM if len(marks) == 2 and all(mark is TERM for mark in marks) else UNKNOWN
    dtypes = (call.out.dtype, call.operands[-1][0].dtype)
    exact = dtypes[0] == dtypes[1] or all(dtype.is_floating_point for dtype in dtypes)
    return TERM if exact and all(mark is TERM for mark in marks) else UNKNOWN


def _view(call: Call) -> Mark:
    source, mark = call.operands[0]
    return reviewed(mark, source.shape, call.out.shape)


def _permute(call: Call) -> Mark:
    order = call.dims(1, "dims")
    return _moved(call, order.index)


def _transpose(call: Call) -> Mark:
    ndim = call.operands[0][0].ndim
    if call.name == "t":
        a, b = (0, 1) if ndim == 2 else (0, 0)
    else:
        a, b = call.args[1] % ndim, call.args[2] % ndim
    return _moved(call, lambda dim: {a: b, b: a}.get(dim, dim))


def _moved(call: Call, place: Callable[[int], int | None]) -> Mark:
    """The first operand's cut goes to ``place(dim)``; None where the dim is lost."""
    mark = call.operands[0][1]
    if not isinstance(mark, Cut):
        return mark
    to = place(mark.dim)
    return UNKNOWN if to is None else Cut(to, mark.outer)


def _unsqueeze(call: Call) -> Mark:
    at = call.args[1] % call.out.ndim
    return _moved(call, lambda dim: dim + (dim >= at))


def _squeeze(call: Call) -> Mark:
    source = call.operands[0][0]
    dims = call.dims(1)
    gone = {d for d in dims if source.shape[d] == 1}
    return _moved(call, lambda dim: None if dim in gone else dim - sum(g < dim for g in gone))


def _expand(call: Call) -> Mark:
    extra = call.out.ndim - call.operands[0][0].ndim
    return _moved(call, lambda dim: dim + extra)


def _select(call: Call) -> Mark:
    at = call.dims(1)[0]
    return _moved(call, lambda dim: None if dim == at else dim - (dim > at))


def _along(position: int, default: int | None = None) -> Rule:
    """Operations that mix entries of one dim only and keep all dims (softmax, slice, sort...)."""

    def rule(call: Call) -> Mark:
        source = call.operands[0][0]
        given = call.argument(position, "dim", default)
        at = given % max(source.ndim, 1) if isinstance(given, int) else 0
        untouched = call.name == "slice" and _takes_all(call)
        return _moved(call, lambda dim: None if dim == at and not untouched else dim)

    return rule


def _takes_all(call: Call) -> bool:
    """`x[:]`: an end that is a number may be the end of the shard only."""
    start, end, step = (
        call.argument(at, name, default)
        for at, name, default in ((2, "start", None), (3, "end", None), (4, "step", 1))
    )
    return start in (None, 0) and (end is None or end >= sys.maxsize) and step == 1


def _reduce(position: int) -> Rule:
    def rule(call: Call) -> Mark:
        source, mark = call.operands[0]
        if isinstance(call.argument(position, "dim", None), Tensor):
            return pointwise(call)  # max and min of two tensors go by the same name
        dims = call.dims(position)
        if not isinstance(mark, Cut):
            return mark  # a sum of terms
        if mark.dim in dims:
            return TERM if call.name == "sum" else UNKNOWN
        if call.out.ndim == source.ndim:
            return mark
        return Cut(mark.dim - sum(d < mark.dim for d in dims), mark.outer)

    return rule


def _matmul(call: Call) -> Mark:
    """mm, bmm and (with a bias or buffer in front) addmm, baddbmm, read as an einsum."""
    *bias, (left, left_mark), (right, right_mark) = call.operands
    out = "bmn"[-call.out.ndim :]
    found = {
        _factor(left_mark, "bmk"[-left.ndim :], right_mark, "bkn"[-right.ndim :], out),
        _factor(right_mark, "bkn"[-right.ndim :], left_mark, "bmk"[-left.ndim :], out),
    } - {WHOLE, FOREIGN}
    if bias and call.kwargs.get("beta", 1) != 0:
        operand, mark = bias[0]
        if isinstance(mark, Cut):
            found.add(Cut(mark.dim + call.out.ndim - operand.ndim, mark.outer))
        elif mark is TERM or TERM in found:
            found.add(mark)  # a whole bias on every term would be summed once per rank
    return found.pop() if len(found) == 1 else UNKNOWN


def _factor(mark: Mark, dims: str, other: Mark, other_dims: str, out: str) -> Mark:
    """What one factor, with ``dims`` named as in an einsum, says of the product."""
    if mark is TERM:
        return TERM if other in (WHOLE, FOREIGN) else UNKNOWN
    if not isinstance(mark, Cut):
        return mark
    name = dims[mark.dim]
    if name != "k":
        return Cut(out.index(name), mark.outer)
    both = isinstance(other, Cut) and other_dims[other.dim] == "k" and other.outer == mark.outer
    return TERM if both or other is FOREIGN else UNKNOWN


def _embedding(call: Call) -> Mark:
    (weight, weight_mark), (_, index_mark) = call.operands[:2]
    if isinstance(index_mark, Cut):
        return index_mark if not isinstance(weight_mark, Cut) else UNKNOWN
    if isinstance(weight_mark, Cut) and weight_mark.dim == weight.ndim - 1:
        return Cut(call.out.ndim - 1, weight_mark.outer)
    return UNKNOWN


def _cat(call: Call) -> Mark:
    parts = [(t, m) for t, m in call.operands if t.numel() or t.ndim > 1]
    at = call.argument(1, "dim", 0) % call.out.ndim
    if all(m is TERM for _, m in parts):
        return TERM
    mark = _merged([m for _, m in parts])
    return UNKNOWN if isinstance(mark, Cut) and mark.dim == at else mark


def _stack(call: Call) -> Mark:
    at = call.argument(1, "dim", 0) % call.out.ndim
    mark = _merged([m for _, m in call.operands])
    return Cut(mark.dim + (mark.dim >= at), mark.outer) if isinstance(mark, Cut) else mark


def _attention(call: Call) -> Mark:
    """Fused scaled-dot-product attention, [batch, heads, sequence, width]: batch and heads pass.

    An operand that is whole there would be met by another part of the others on one process. But
    each query meets every key: a cut of the queries' sequence alone is one of the output's.
    """
    query, *keys_and_values = (m for _, m in call.operands[:3])
    if isinstance(query, Cut) and query.dim == 2 and call.out.ndim == 4:
        return query if all(m in (WHOLE, FOREIGN) for m in keys_and_values) else UNKNOWN
    mark = _merged([m for _, m in call.operands[:3]])
    if not isinstance(mark, Cut) or mark.dim > 1 or call.out.ndim != 4:
        return UNKNOWN
    fits = all(m is not WHOLE or t.shape[mark.dim] == 1 for t, m in call.operands[:3])
    return mark if fits else UNKNOWN


def _normalised_last(call: Call) -> Mark:
    """layer_norm, rms_norm: trailing dims are mixed, leading dims pass."""
    source, mark = call.operands[0]
    trailing = len(call.args[1])
    passes = isinstance(mark, Cut) and mark.dim < source.ndim - trailing
    weights_cut = any(isinstance(m, Cut) for _, m in call.operands[1:])
    return mark if passes and not weights_cut else UNKNOWN


def _batched(call: Call) -> Mark:
    """Convolutions and the like: only the leading dim is independent."""
    mark = call.operands[0][1]
    others_cut = any(isinstance(m, Cut) for _, m in call.operands[1:])
    return mark if isinstance(mark, Cut) and mark.dim == 0 and not others_cut else UNKNOWN


def _padded(call: Call) -> Mark:
    """Padding is listed in pairs from the last dim on; a cut dim must get none."""
    padding, ndim = list(call.args[1]), call.out.ndim

    def place(dim: int) -> int | None:
        at = 2 * (ndim - 1 - dim)
        return None if any(padding[at : at + 2]) else dim

    return _moved(call, place)


def _index_select(call: Call) -> Mark:
    mark = call.operands[0][1]
    at = call.dims(1)[0]
    index_cut = any(isinstance(m, Cut) for _, m in call.operands[1:])
    return mark if isinstance(mark, Cut) and mark.dim != at and not index_cut else UNKNOWN


def _index(call: Call) -> Mark:
    """``x[indices]``, None where a dim is kept: one integer tensor, on a dim that is not cut."""
    mark = call.operands[0][1]
    indices = call.args[1]
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    index_marks = [m for _, m in call.operands[1:]]
    if len(given) != 1 or given[0][1].dtype in (torch.bool, torch.uint8):
        return UNKNOWN
    at, index = given[0]
    if isinstance(index_marks[0], Cut):
        cut = index_marks[0]
        return UNKNOWN if isinstance(mark, Cut) else Cut(at + cut.dim, cut.outer)
    if not isinstance(mark, Cut) or mark.dim == at:
        return UNKNOWN
    return Cut(mark.dim + (index.ndim - 1 if mark.dim > at else 0), mark.outer)


def _index_put(call: Call) -> Mark:
    """``x[indices] = values``: a cut dim must be kept, or under a boolean mask cut alike."""
    mark = call.operands[0][1]
    if not isinstance(mark, Cut):
        return UNKNOWN
    index_marks = {id(t): m for t, m in call.operands[1:]}
    at = 0
    for index in call.args[1]:
        if index is None:
            at += 1
            continue
        masks = index.dtype in (torch.bool, torch.uint8)
        covered = index.ndim if masks else 1
        index_mark = index_marks[id(index)]
        if at <= mark.dim < at + covered:
            if not (masks and index_mark == Cut(mark.dim - at, mark.outer)):
                return UNKNOWN
        elif isinstance(index_mark, Cut):
            return UNKNOWN
        at += covered
    return mark


def _gather(call: Call) -> Mark:
    """gather / scatter: operands share all dims; the indexed one must not be cut."""
    at = call.dims(1)[0]
    mark = _merged([m for _, m in call.operands])
    return mark if isinstance(mark, Cut) and mark.dim != at else UNKNOWN


def _repeat(call: Call) -> Mark:
    source = call.operands[0][0]
    extra = call.out.ndim - source.ndim
    return _moved(
        call, lambda dim: dim + extra if source.shape[dim] == call.out.shape[dim + extra] else None
    )


_COPIES = {
    "_to_copy", "clone", "copy_", "detach", "alias", "lift_fresh", "contiguous", "positive",
    "_conj", "view_as_real_copy", "resolve_conj",
}  # fmt: skip

# Under these, terms of a sum may stay terms of a sum.
_LINEAR = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand",
    "squeeze", "unsqueeze", "select", "slice", "split", "split_with_sizes", "unbind", "cat", "neg",
    "clone", "detach", "alias", "contiguous", "_to_copy", "copy_", "add", "add_", "sub", "sub_",
    "mul", "mul_", "div", "div_", "mm", "bmm", "addmm", "baddbmm", "sum", "cumsum",
}  # fmt: skip
_OVERWRITING = {"copy_", "copy"}
_MOST_COMBINATIONS = 64

_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ["zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
         "native_dropout", "bernoulli", "bernoulli_", "where", "masked_fill", "masked_fill_",
         "fill_", "zero_", "_fused_dropout", "floor_divide", "floor_divide_", *_COPIES],
        pointwise,
    ),
    # A constant of sizes that may or may not be local ones: it fits what it is combined with.
    **dict.fromkeys(["new_empty", "new_zeros", "new_ones", "new_full"], lambda call: FOREIGN),
    **dict.fromkeys(["view", "_unsafe_view", "reshape", "_reshape_alias"], _view),
    **dict.fromkeys(["transpose", "t"], _transpose),
    **dict.fromkeys(["mm", "bmm", "addmm", "baddbmm", "baddbmm_", "addmm_"], _matmul),
    **dict.fromkeys(["sum", "mean", "amax", "amin", "any", "all", "prod", "logsumexp", "var", "std",
                     "argmax", "argmin", "max", "min"], _reduce(1)),
    **dict.fromkeys(["linalg_vector_norm", "norm"], _reduce(2)),
    **dict.fromkeys(["_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cummax", "slice",
                     "unfold"], _along(1, 0)),
    **dict.fromkeys(["split", "split_with_sizes"], _along(2, 0)),
    **dict.fromkeys(["topk"], _along(2, -1)),
    **dict.fromkeys(["sort"], _along(1, -1)),
    **dict.fromkeys(["select", "unbind"], _select),
    **dict.fromkeys(["squeeze"], _squeeze),
    **dict.fromkeys(["unsqueeze"], _unsqueeze),
    **dict.fromkeys(["native_layer_norm", "_fused_rms_norm", "rms_norm"], _normalised_last),
    **dict.fromkeys(["convolution", "native_group_norm"], _batched),
    **dict.fromkeys(["gather", "scatter", "scatter_", "scatter_add", "scatter_add_"], _gather),
    **dict.fromkeys(["tril", "triu"], lambda call: _moved(
        call, lambda dim: dim if dim < call.out.ndim - 2 else None)),
    **dict.fromkeys(["_scaled_dot_product_flash_attention_for_cpu",
                     "_scaled_dot_product_flash_attention",
                     "_scaled_dot_product_efficient_attention",
                     "_scaled_dot_product_cudnn_attention",
                     "_scaled_dot_product_fused_attention_overrideable"], _attention),
    "permute": _permute,
    "expand": _expand,
    "embedding": _embedding,
    "cat": _cat,
    "stack": _stack,
    "constant_pad_nd": _padded,
    "index_select": _index_select,
    "index": _index,
    "index_put": _index_put,
    "index_put_": _index_put,
    "_index_put_impl_": _index_put,
    "repeat": _repeat,
    "view_as_complex": lambda call: _moved(call, lambda dim: dim if dim < call.out.ndim else None),
    "view_as_real": lambda call: _moved(call, lambda dim: dim),
}  # fmt: skip
