"""What all hook points of one FlexModel share, and the one forward that is under way."""

from __future__ import annotations

import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from flex_model.core.hook_function import HookFunction
from flex_model.core.randomness import in_backward
from flex_model.core.records import Records
from flex_model.core.unpacking import tensors_in
from flex_model.distributed.agreement import StepFacts, agree, word_for
from flex_model.distributed.mesh import ParallelMesh
from flex_model.distributed.sharing import SharedModules
from flex_model.distributed.watch import Watch
from flex_model.errors import LayoutError
from flex_model.layouts.dtensor import placements_by_name
from flex_model.layouts.experts import boundaries, shares_experts
from flex_model.layouts.marks import FOREIGN, UNKNOWN, WHOLE, Cut, Mark, from_placement
from flex_model.layouts.names import named_modules, named_parameters
from flex_model.layouts.resolve import Loss, parameter_placement, tell
from flex_model.layouts.sources import Site
from flex_model.layouts.trace import LayoutTrace

__all__ = ["Session"]


class Point(Protocol):
    """What the session needs of a hook point."""

    label: str

    @property
    def gather_backwards(self) -> int: ...

    @property
    def hooks(self) -> list[HookFunction]: ...

    def needs_trace(self) -> bool: ...

    before_trace: Callable[[], None] | None


class Session:
    """Shared state of the hook points, and the boundaries of each forward.

    Attributes:
        root: the wrapped model.
        mesh: the job's ranks.
        records: where captured tensors go.
        save_ctx: the users' namespace, handed to editing functions.
        modules: the trainable modules, handed to editing functions.
        shared: the same, for editing functions that work on shards.
        debug: whether every edit is checked, at the price of time and traffic.
        seed: of the random streams.
        loss: how the losses of data-parallel ranks combine.
        batch_dim: dim of the model's inputs along which dp cuts.
        active: hook functions switched on; None means all.
        batch_sizes: batch of every data-parallel rank in this forward.
        trace: marks of this forward's tensors, if it is watched.
    """

    def __init__(
        self,
        root: nn.Module,
        mesh: ParallelMesh,
        records: Records,
        *,
        seed: int,
        loss: Loss,
        batch_dim: int,
        debug: bool = False,
    ) -> None:
        self.root = root
        self.mesh = mesh
        self.sizes = {name: mesh.size(name) for name in mesh.names}
        self.dim_names = {_ranks_of(mesh, name): name for name in mesh.names}
        self.records = records
        self.save_ctx = Namespace()
        self.modules = nn.ModuleDict()
        self.shared = SharedModules(self.modules, mesh)
        self.debug = debug
        self.seed = seed
        self.loss: Loss = loss
        self.batch_dim = batch_dim
        self.points: list[Point] = []
        self.active: frozenset[HookFunction] | None = None
        self.batch_sizes: tuple[int, ...] = ()
        self.trace: LayoutTrace | None = None
        self._depth = 0
        self._visits = 0
        self._described: set[tuple[int, int]] = set()
        self._handles: list[Any] = []
        self._layer_handles: list[Any] = []
        self._entered: dict[str, tuple[torch.Size, dict[str, Mark]]] = {}
        self._shares_experts = shares_experts(root)

    def is_active(self, hook: HookFunction) -> bool:
        """Whether a hook function runs in this forward."""
        return self.active is None or hook in self.active

    @contextmanager
    def only(self, hooks: frozenset[HookFunction] | None) -> Iterator[None]:
        """Switch on these hook functions alone, while inside."""
        before, self.active = self.active, hooks
        try:
            yield
        finally:
            self.active = before

    def attach(self) -> None:
        """Follow the root's forwards, however they are started (``generate`` too)."""
        if self.mesh.watch is None:
            return
        self.mesh.watch.attached(True)
        if self._handles:  # hooks on the root itself belong before its end
            self._handles.pop().remove()
        else:
            begin = self.root.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
            self._handles = [begin]
        self._handles.append(self.root.register_forward_hook(self._end, always_call=True))

    def detach(self) -> None:
        """Leave the root as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.close()
        if self.mesh.watch is not None:
            self.mesh.watch.attached(False)

    def close(self) -> None:
        """End the forward that is under way, whatever interrupted it."""
        self._depth = 0
        self.shared.end_forward()
        if self.trace is not None:
            trace, self.trace = self.trace, None
            self._unwatch()
            trace.stop()

    def dtensor_marks(self, tensor: DTensor) -> dict[str, Mark]:
        """How a DTensor lies over the job's mesh."""
        try:
            placements = placements_by_name(tensor, self.dim_names)
        except LayoutError:
            if not self._shares_experts:
                raise
            return dict.fromkeys(self.sizes, UNKNOWN)  # experts may lie over ranks of their own
        return {name: from_placement(p, tensor.ndim) for name, p in placements.items()}

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._depth += 1
        if self._depth > 1 or in_backward():
            return
        self.shared.begin_forward()
        active = [p for p in self.points if any(self.is_active(h) for h in p.hooks)]
        inputs = list(tensors_in((args, kwargs)))
        self._agree(active, inputs)
        unknown = [point for point in active if point.needs_trace()]
        for point in unknown:
            if point.before_trace is not None:
                point.before_trace()
        if unknown:
            self.attach()  # behind the observers that were just moved
            plain = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._watch(inputs, {id(tensor) for tensor in plain})

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            self.close()

    def visit(self, label: str) -> None:
        """Note that a hook point is visited: the ranks compare the order they came by."""
        self._visits = zlib.crc32(label.encode(), self._visits)
        if self.mesh.watch is not None:
            self.mesh.watch.where = label

    def failed(self, where: str, error: Exception) -> Exception:
        """What to raise for an exception, after the other ranks have been told of it."""
        return error if self.mesh.watch is None else self.mesh.watch.failed(where, error)

    def _agree(self, active: list[Point], inputs: list[Tensor]) -> None:
        watch, control = self.mesh.watch, self.mesh.control
        if watch is None or control is None:
            return
        hooks = self._digest(watch, active)
        step = watch.begin_step(word_for(hooks))
        if not active:
            return
        watch.where = f"the start of forward {step}"
        facts = StepFacts(
            step=step,
            hooks=hooks,
            visits=self._visits,
            gather_backwards=sum(point.gather_backwards for point in self.points),
            input_shape=tuple(_batched(inputs).shape) if inputs else (),
            batch_dim=self.batch_dim,
        )
        self.batch_sizes = agree(control, self.mesh, facts)

    def _digest(self, watch: Watch, active: list[Point]) -> tuple[int, int]:
        """How many hooks are active and a digest of them, their names posted for the others."""
        labels = [
            f"{point.label}*{sum(self.is_active(h) for h in point.hooks)}" for point in active
        ]
        found = (len(labels), zlib.crc32("\n".join(labels).encode()))
        if found not in self._described:
            self._described.add(found)
            watch.board.describe(word_for(found), labels)
        return found

    def _watch(self, inputs: list[Tensor], plain: set[int]) -> None:
        """Enter a trace whose starting marks are the model's parameters and inputs."""
        groups = {name: self.mesh.group(name) for name in self.mesh.names}
        first = _batched(inputs) if inputs else None
        has_batch = first is not None and first.ndim > self.batch_dim
        batch = first.shape[self.batch_dim] if first is not None and has_batch else 0
        trace = LayoutTrace(groups, self.dtensor_marks, batch=batch)
        names = {id(p): n for n, p in named_parameters(self.root)}
        trace.mark_parameters(
            self.root, lambda tensor: self._parameter_marks(names.get(id(tensor)), tensor)
        )
        for tensor in inputs:
            is_plain = id(tensor) in plain or tensor is first
            trace.mark(tensor, self._input_marks(tensor, tensor is first, batch, is_plain))
        self.trace = trace
        self._watch_layers(trace)
        trace.start()

    def _parameter_marks(self, name: str | None, tensor: Tensor) -> Mapping[str, Mark]:
        placement = parameter_placement(self.root, name, tensor) if name else None
        return {"tp": from_placement(placement, tensor.ndim)} if placement else {}

    def _input_marks(self, tensor: Tensor, first: bool, batch: int, plain: bool) -> dict[str, Mark]:
        """Batch over dp; whole over tp, but for what an earlier forward left (a cache)."""
        at = self.batch_dim
        marks: dict[str, Mark] = {"tp": WHOLE if plain else FOREIGN}
        fits = tensor.ndim > at and tensor.shape[at] == batch
        # A lone dim as long as the batch may as well be positions: it fits whatever it meets.
        positions = tensor.ndim == 1 and not first
        marks["dp"] = WHOLE if not fits else FOREIGN if positions else Cut(at)
        return marks

    def _watch_layers(self, trace: LayoutTrace) -> None:
        """Let the frameworks' word stand over what was followed through a layer's inside."""
        around_experts = boundaries(self.root)
        for name, module in named_modules(self.root):
            if name in around_experts:
                enter = partial(self._enter, name)
                handle = module.register_forward_pre_hook(enter, with_kwargs=True)
                self._layer_handles.append(handle)
            site = Site(self.root, name, module, "output", 0, 3)
            if name in around_experts or ("tp" in self.sizes and tell(site) is not None):
                handle = module.register_forward_hook(
                    lambda m, a, out, name=name: self.mark_output(name, m, out)
                )
                self._layer_handles.append(handle)

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note how the first input lies of a module whose first output lies alike."""
        tensor = next(tensors_in((args, kwargs)), None)
        if self.trace is not None and tensor is not None:
            self._entered[name] = (tensor.shape, self.trace.marks_of(tensor))

    def mark_output(self, name: str, module: nn.Module, output: Any) -> None:
        """Mark a parallel layer's outputs over tp as the framework tells, or as what came in."""
        if self.trace is None:
            return
        for index, tensor in enumerate(tensors_in(output)):
            marks: dict[str, Mark] = {}
            shape, entered = self._entered.get(name, (None, {}))
            if index == 0 and tensor.shape == shape:
                marks = {n: m for n, m in entered.items() if m not in (FOREIGN, UNKNOWN)}
            told = tell(Site(self.root, name, module, "output", index, tensor.ndim))
            if told is not None and "tp" in self.sizes:
                marks["tp"] = from_placement(told.value, tensor.ndim)
            if marks and not isinstance(tensor, DTensor):
                self.trace.mark(tensor, marks)

    def _unwatch(self) -> None:
        for handle in self._layer_handles:
            handle.remove()
        self._layer_handles = []
        self._entered = {}


def _batched(inputs: list[Tensor]) -> Tensor:
    """The input that tells the batch: one of a lone dim may hold positions."""
    return next((tensor for tensor in inputs if tensor.ndim > 1), inputs[0])


def _ranks_of(mesh: ParallelMesh, name: str) -> tuple[int, ...]:
    return tuple(torch.distributed.get_process_group_ranks(mesh.group(name)))
