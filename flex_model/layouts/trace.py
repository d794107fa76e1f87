"""Watching one forward to see how every value in it lies over the ranks.

Frameworks tell the layout of their own layers. For all that lies between (an activation function,
attention heads, rotary tables, a user's own module) and for the batch dim, the first forward with a
new kind of input is watched: model inputs start cut along the batch over dp, parameters as their
framework sharded them, and each ATen operation passes the marks on (``propagation``). Nothing runs
twice and nothing is run on made-up data, so caches, random streams and other people's hooks see one
ordinary forward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flex_model.layouts.marks import FOREIGN, TERM, UNKNOWN, WHOLE, Cut, Mark, OneOf, one_of
from flex_model.layouts.propagation import Call, has_rule, propagate

__all__ = ["LayoutTrace", "paused", "running"]

# Functional collectives name their reduction and their group, both as strings.
_REDUCE_OPERATIONS = frozenset({"sum", "avg", "product", "min", "max", "band", "bor", "bxor"})

_IN_PLACE = frozenset({"allreduce", "all_reduce", "wait_tensor", "broadcast"})
_GATHERS = frozenset({"_allgather_base", "all_gather_into_tensor"})
_SCATTERS = frozenset({"_reduce_scatter_base", "reduce_scatter_tensor"})

_Key = tuple[int, int, tuple[int, ...], tuple[int, ...]]
_CUTS = (Cut, OneOf)
_VIEWS = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias"})
_PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm"})


class LayoutTrace(TorchDispatchMode):
    """The marks of every tensor computed while the mode is entered.

    Args:
        groups: process group by mesh dim, for the dims to watch.
        dtensor_marks: how a DTensor lies over those mesh dims.
        batch: this rank's batch; what is repeated as often follows it over dp.

    Tensors are known by memory, offset, shape and strides, for autograd makes new Python objects
    of a view but not new memory.
    """

    def __init__(
        self,
        groups: Mapping[str, ProcessGroup],
        dtensor_marks: Callable[[DTensor], Mapping[str, Mark]],
        batch: int = 0,
    ) -> None:
        super().__init__()
        self._names = tuple(groups)
        self._dim_names = {_ranks(group): name for name, group in groups.items()}
        self._sizes = {name: group.size() for name, group in groups.items()}
        self._dtensor_marks = dtensor_marks
        self._batch = batch
        self._folded: dict[_Key, _Key] = {}
        self._marks: dict[_Key, tuple[Mark, ...]] = {}
        self._keys_of: defaultdict[int, set[_Key]] = defaultdict(set)
        self._storages: dict[int, StorageWeakRef] = {}
        self._paused = False

    def mark(self, tensor: Tensor, marks: Mapping[str, Mark], otherwise: Mark = UNKNOWN) -> None:
        """State how a tensor lies; over mesh dims left out, what is known of it stands."""
        key = self._key(_local(tensor))
        known = self._marks.get(key, (otherwise,) * len(self._names))
        self._set(
            key, tuple(marks.get(name, old) for name, old in zip(self._names, known, strict=True))
        )

    def marks_of(self, tensor: Tensor) -> dict[str, Mark]:
        """How a tensor lies, by mesh dim; FOREIGN for one the trace never saw."""
        found = dict(zip(self._names, self._lookup(tensor), strict=True))
        if isinstance(tensor, nn.Parameter):
            # A parameter never follows batch or sequence, however FSDP got it here.
            found.update((name, WHOLE) for name in ("dp", "cp") if name in found)
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
        """Leave out what runs inside."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def start(self) -> None:
        """Watch from here on.

        A DTensor that is redistributed or opened passes no operation that names it: its local
        tensor comes out of collectives on chunks, or as it is. So these two are followed by name.
        """
        if not _running:
            _follow_dtensors()
        _running.append(self)
        self.__enter__()

    def stop(self) -> None:
        """Leave torch as it was."""
        self.__exit__(None, None, None)
        _running.remove(self)
        if not _running:
            DTensor.redistribute, DTensor.to_local = _originals.pop()  # type: ignore[method-assign]

    def mark_redistributed(self, result: DTensor, before: Mapping[str, Mark]) -> None:
        """State how a DTensor lies that came of another."""
        self.mark(result, {**before, **self._dtensor_marks(result)})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused or func.namespace == "prim":  # what a fake tensor asks of its device
            return func(*args, **kwargs)
        if is_composite(func):  # under inference_mode these come whole
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
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
                found[name] = UNKNOWN if lost and isinstance(mark, _CUTS) else mark
            if operands:
                self._settle(func, locals_[:2], local, found)
            if isinstance(out, DTensor):
                found.update(self._dtensor_marks(out))
            self._record(local, found, written=func._schema.is_mutable)

    def _settle(
        self, func: Any, operands: Sequence[Tensor], out: Tensor, found: dict[str, Mark]
    ) -> None:
        """Decide what shapes leave open: a fold undone after a product, or a batch of copies."""
        name = func.overloadpacket.__name__
        if name in _VIEWS:
            self._unfold(self._key(operands[0]), out, found)
        elif name in _PRODUCTS:
            left = self._key(operands[1] if name in ("addmm", "baddbmm") else operands[0])
            if left in self._folded:
                self._folded[self._key(out)] = self._folded[left]
        elif name == "expand" and found.get("dp") in (WHOLE, FOREIGN) and self._batch > 1:
            lone = _lone_dims(operands[0], out.ndim)
            copied = [at for at in lone if out.shape[at] == self._batch]
            found["dp"] = Cut(copied[0]) if copied else found["dp"]

    def _unfold(self, source: _Key, out: Tensor, found: dict[str, Mark]) -> None:
        """A linear layer is seen as view, matrix product, view: the last undoes the first."""
        before = self._folded.get(source)
        self._folded[self._key(out)] = source
        if before is None or tuple(out.shape[:-1]) != before[2][:-1]:
            return
        for dim, mark in zip(self._names, self._marks[before], strict=True):
            opened = found[dim]
            if isinstance(opened, OneOf) and mark in opened.cuts:
                found[dim] = mark

    def _record(self, local: Tensor, marks: Mapping[str, Mark], *, written: bool) -> None:
        """Note a result; what shares the memory of a tensor written to is no longer known."""
        key = self._key(local)
        found = tuple(marks[name] for name in self._names)
        if written:
            for other in self._keys_of[key[0]] - {key}:
                self._marks[other] = tuple(
                    old if old == new else UNKNOWN
                    for old, new in zip(self._marks[other], found, strict=True)
                )
        elif 1 in local.shape and key in self._marks:
            # Two views of one memory with a lone dim here and there cannot be told apart.
            found = tuple(
                one_of((old, new)) if isinstance(old, _CUTS) and isinstance(new, _CUTS) else new
                for old, new in zip(self._marks[key], found, strict=True)
            )
        self._set(key, found)

    def _set(self, key: _Key, marks: tuple[Mark, ...]) -> None:
        self._keys_of[key[0]].add(key)
        self._marks[key] = marks

    def _key(self, tensor: Tensor) -> _Key:
        """A tensor by its memory, and where in it. A weak reference keeps the name from reuse."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # functorch's wrappers have none
            return (-id(tensor), 0, tuple(tensor.shape), ())
        name = storage._cdata
        if name not in self._storages:
            self._storages[name] = StorageWeakRef(storage)
        return (name, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())

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
        known = self._marks.get(self._key(_local(tensor)))
        if known is not None:
            return known
        # A lone number from outside (an epsilon, a scale) is a constant of the program.
        return (WHOLE if tensor.numel() == 1 else FOREIGN,) * len(self._names)


# Those that watch now: of several FlexModels around one model, each has its own.
_running: list[LayoutTrace] = []
_originals: list[tuple[Any, Any]] = []


def running() -> Sequence[LayoutTrace]:
    """The traces that watch now."""
    return tuple(_running)


@contextmanager
def paused() -> Iterator[None]:
    """Leave out what runs inside (an editing function, our own collectives) of every trace."""
    with ExitStack() as stack:
        for trace in _running:
            stack.enter_context(trace.paused())
        yield


def _follow_dtensors() -> None:
    redistribute, to_local = DTensor.redistribute, DTensor.to_local
    _originals.append((redistribute, to_local))

    def redistributed(tensor: DTensor, *args: Any, **kwargs: Any) -> DTensor:
        before = [(trace, trace.marks_of(tensor)) for trace in _running]
        result = redistribute(tensor, *args, **kwargs)
        for trace, marks in before:
            trace.mark_redistributed(result, marks)
        return result

    def opened(tensor: DTensor, *args: Any, **kwargs: Any) -> Tensor:
        local = to_local(tensor, *args, **kwargs)
        for trace in _running:
            trace.mark(local, trace.marks_of(tensor))
        return local

    DTensor.redistribute = redistributed  # type: ignore[method-assign, assignment]
    DTensor.to_local = opened  # type: ignore[method-assign, assignment]


def _lone_dims(tensor: Tensor, ndim: int) -> list[int]:
    """The dims of length 1, or none at all, counted as the dims of a result of `ndim` dims."""
    extra = ndim - tensor.ndim
    return [at for at in range(ndim) if at < extra or tensor.shape[at - extra] == 1]


def _ranks(group: ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def is_composite(func: Any) -> bool:
    """Whether an operation is made of others that have rules, and has none itself."""
    return not has_rule(func) and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )
