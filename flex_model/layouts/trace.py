"""Watching one forward to see how every value in it lies over the ranks.

Frameworks tell the layout of their own layers. For all that lies between (an activation function,
attention heads, rotary tables, a user's own module) and for the batch dim, the first forward with a
new kind of input is watched: model inputs start cut along the batch over dp, parameters as their
framework sharded them, and each ATen operation passes the marks on (``propagation``). Nothing runs
twice and nothing is run on made-up data, so caches, random streams and other people's hooks see one
ordinary forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flex_model.layouts.marks import FOREIGN, TERM, UNKNOWN, WHOLE, Cut, Mark
from flex_model.layouts.propagation import Call, propagate

__all__ = ["LayoutTrace"]

# Functional collectives name their reduction and their group, both as strings.
_REDUCE_OPERATIONS = frozenset({"sum", "avg", "product", "min", "max", "band", "bor", "bxor"})

_IN_PLACE = frozenset({"allreduce", "all_reduce", "wait_tensor", "broadcast"})
_GATHERS = frozenset({"_allgather_base", "all_gather_into_tensor"})
_SCATTERS = frozenset({"_reduce_scatter_base", "reduce_scatter_tensor"})

_Key = tuple[int, tuple[int, ...], tuple[int, ...]]


class LayoutTrace(TorchDispatchMode):
    """The marks of every tensor computed while the mode is entered.

    Args:
        groups: process group by mesh dim, for the dims to watch.
        dtensor_marks: how a DTensor lies over those mesh dims.

    Tensors are known by memory, shape and strides, for autograd makes new Python objects of a view
    but not new memory.
    """

    def __init__(
        self,
        groups: Mapping[str, ProcessGroup],
        dtensor_marks: Callable[[DTensor], Mapping[str, Mark]],
    ) -> None:
        super().__init__()
        self._names = tuple(groups)
        self._dim_names = {_ranks(group): name for name, group in groups.items()}
        self._sizes = {name: group.size() for name, group in groups.items()}
        self._dtensor_marks = dtensor_marks
        self._marks: dict[_Key, tuple[Mark, ...]] = {}
        self._paused = False

    def mark(self, tensor: Tensor, marks: Mapping[str, Mark], otherwise: Mark = UNKNOWN) -> None:
        """State how a tensor lies; over mesh dims left out, what is known of it stands."""
        local = _local(tensor)
        known = self._marks.get(_key(local), (otherwise,) * len(self._names))
        self._marks[_key(local)] = tuple(
            marks.get(name, old) for name, old in zip(self._names, known, strict=True)
        )

    def marks_of(self, tensor: Tensor) -> dict[str, Mark]:
        """How a tensor lies, by mesh dim; FOREIGN for one the trace never saw."""
        found = dict(zip(self._names, self._lookup(tensor), strict=True))
        if isinstance(tensor, nn.Parameter) and "dp" in found:
            found["dp"] = WHOLE  # a parameter never follows the batch, however FSDP got it here
        if isinstance(tensor, DTensor):
            found.update(self._dtensor_marks(tensor))
        return found

    def mark_parameters(
        self, module: nn.Module, marks: Callable[[Tensor], Mapping[str, Mark]]
    ) -> None:
        """Parameters and buffers lie as their framework sharded them, else whole."""
        for tensor in (*module.parameters(), *module.buffers()):
            own = self._dtensor_marks(tensor) if isinstance(tensor, DTensor) else marks(tensor)
            self.mark(tensor, own, otherwise=WHOLE)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what runs inside (an editing function, our own collectives)."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __enter__(self) -> LayoutTrace:
        # A DTensor that is redistributed or opened passes no operation that names it: its local
        # tensor comes out of collectives on chunks, or as it is. So these two are followed by name.
        self._originals = (DTensor.redistribute, DTensor.to_local)
        DTensor.redistribute = self._following_redistribute(DTensor.redistribute)  # type: ignore[method-assign]
        DTensor.to_local = self._following_to_local(DTensor.to_local)  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        DTensor.redistribute, DTensor.to_local = self._originals  # type: ignore[method-assign]

    def _following_redistribute(self, original: Callable[..., DTensor]) -> Callable[..., DTensor]:
        def redistribute(tensor: DTensor, *args: Any, **kwargs: Any) -> DTensor:
            before = self.marks_of(tensor)
            result = original(tensor, *args, **kwargs)
            self.mark(result, {**before, **self._dtensor_marks(result)})
            return result

        return redistribute

    def _following_to_local(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def to_local(tensor: DTensor, *args: Any, **kwargs: Any) -> Tensor:
            local = original(tensor, *args, **kwargs)
            self.mark(local, self.marks_of(tensor))
            return local

        return to_local

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # Looked up before the call: an in-place operation changes what its operand is.
        marks = [self.marks_of(operand) for operand in operands]
        result = func(*args, **kwargs)
        outs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func.namespace in ("c10d", "_c10d_functional"):
            self._follow_collective(func, args, operands, marks, outs)
        else:
            self._follow(func, args, kwargs, operands, marks, outs)
        return result

    def _follow(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        operands: Sequence[Tensor],
        marks: Sequence[Mapping[str, Mark]],
        outs: Sequence[Tensor],
    ) -> None:
        locals_ = [_local(operand) for operand in operands]
        for position, out in enumerate(outs):
            local = _local(out)
            found = {}
            for name in self._names:
                pairs = [(t, m[name]) for t, m in zip(locals_, marks, strict=True)]
                mark = propagate(Call(func, args, kwargs, pairs, local))
                # The further results of fused attention and norms have shapes of their own.
                lost = position > 0 and local.ndim != _local(outs[0]).ndim
                found[name] = UNKNOWN if lost and isinstance(mark, Cut) else mark
            if isinstance(out, DTensor):
                found.update(self._dtensor_marks(out))
            self._marks[_key(local)] = tuple(found[name] for name in self._names)

    def _follow_collective(
        self,
        func: Any,
        args: Any,
        operands: Sequence[Tensor],
        marks: Sequence[Mapping[str, Mark]],
        outs: Sequence[Tensor],
    ) -> None:
        """Collectives along a watched dim; over the other mesh dims a cut stays where dims do."""
        name = func.overloadpacket.__name__.rstrip("_")
        along = self._dim_of(args)
        functional = func.namespace == "_c10d_functional"
        if name in _IN_PLACE:
            targets = outs if functional else operands
            for target, found in zip(targets, marks, strict=False):
                reduced = {along: WHOLE} if along and name != "wait_tensor" else {}
                self.mark(target, {**found, **reduced})
        elif name == "allgather":  # into one tensor per rank
            for part in operands[:-1]:
                self.mark(part, {**marks[-1], **({along: WHOLE} if along else {})})
        elif functional and outs and operands:
            self.mark(outs[0], self._stacked(name, along, marks[0]))
        elif len(operands) > 1:
            self.mark(operands[0], self._stacked(name, along, marks[1]))

    def _stacked(self, name: str, along: str | None, source: Mapping[str, Mark]) -> dict[str, Mark]:
        """All-gather into, and reduce-scatter of, one tensor stacked along dim 0."""
        found: dict[str, Mark] = {}
        for dim, mark in source.items():
            whole = mark is WHOLE and not (name in _SCATTERS and dim == along)
            if whole or (name in _GATHERS and dim == along):
                found[dim] = WHOLE
            elif name in _GATHERS and isinstance(mark, Cut):
                ranks = self._sizes[along] if along and mark.dim == 0 else 1
                found[dim] = Cut(mark.dim, mark.outer * ranks)
            elif name in _SCATTERS and dim == along and mark is TERM:
                found[dim] = Cut(0)
            elif name in _SCATTERS and isinstance(mark, Cut) and mark.dim > 0:
                found[dim] = mark
            else:
                found[dim] = UNKNOWN
        return found

    def _dim_of(self, args: Sequence[Any]) -> str | None:
        """The watched mesh dim that a collective runs along, if it is one."""
        for arg in args:
            group = None
            if isinstance(arg, torch.ScriptObject):
                try:
                    group = ProcessGroup.unbox(arg)
                except (RuntimeError, TypeError):
                    continue  # another script object, such as the reduce operation
            elif isinstance(arg, str) and arg not in _REDUCE_OPERATIONS:
                group = _resolve_process_group(GroupName(arg))
            if group is not None:
                return self._dim_names.get(_ranks(group))
        return None

    def _lookup(self, tensor: Tensor) -> tuple[Mark, ...]:
        known = self._marks.get(_key(_local(tensor)))
        if known is not None:
            return known
        # A lone number from outside (an epsilon, a scale) is a constant of the program.
        return (WHOLE if tensor.numel() == 1 else FOREIGN,) * len(self._names)


def _ranks(group: ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _key(tensor: Tensor) -> _Key:
    try:
        return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
    except RuntimeError:  # a tensor without storage (functorch, meta): known by its object
        return (id(tensor), tuple(tensor.shape), ())
