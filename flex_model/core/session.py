"""What all hook points of one FlexModel share, and the one forward that is under way."""

from __future__ import annotations

import sys
import threading
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

from flex_model.core.caller import raised_inside
from flex_model.core.compiled import uncompiled
from flex_model.core.hook_function import HookFunction
from flex_model.core.not_copied import NotCopied
from flex_model.core.pipeline import Pipeline
from flex_model.core.randomness import in_backward
from flex_model.core.records import Records
from flex_model.core.stages import Stages
from flex_model.core.stored import StoredNamespace
from flex_model.core.unpacking import tensors_in
from flex_model.distributed.agreement import StepFacts, agree, agree_on_hooks, word_for
from flex_model.distributed.line import Line
from flex_model.distributed.mesh import ParallelMesh
from flex_model.distributed.sharing import SharedModules
from flex_model.distributed.watch import Watch
from flex_model.errors import LayoutError, RankDisagreementError
from flex_model.layouts.dtensor import placements_by_name
from flex_model.layouts.experts import boundaries, shares_experts
from flex_model.layouts.marks import FOREIGN, UNKNOWN, WHOLE, Cut, Mark, from_placement
from flex_model.layouts.megatron import handed_over
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


class Session(NotCopied):
    """Shared state of the hook points, and the boundaries of each forward.

    Attributes:
        root: the wrapped model.
        mesh: the job's ranks.
        records: where captured tensors go.
        save_ctx: the users' namespace, handed to editing functions.
        modules: the trainable modules, handed to editing functions.
        shared: the same, for editing functions that work on shards.
        stages: which pipeline stage holds which module.
        pipeline: this stage's steps, if there are several stages.
        dry: whether the call under way only finds out shapes.
        debug: whether every edit is checked, at the price of time and traffic.
        seed: of the random streams.
        loss: how the losses of data- and context-parallel ranks combine.
        batch_dim: dim of the model's inputs along which dp cuts.
        sequence_dim: the same for cp.
        zigzag: whether context-parallel ranks hold the sequence in zig-zag order.
        active: hook functions switched on; None means all.
        is_off: tells those that are switched off until further notice.
        batch_sizes: batch of every data-parallel rank in this forward.
        batch: this rank's batch in this forward.
        positions: how much of the sequence this rank holds in this forward, over cp.
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
        sequence_dim: int = 1,
        zigzag: bool = True,
        debug: bool = False,
    ) -> None:
        self.root = root
        self.mesh = mesh
        # No activation lies over the stages of a pipeline: each has its own.
        self.sizes = {name: mesh.size(name) for name in mesh.names if name != "pp"}
        self.dim_names = {_ranks_of(mesh, name): name for name in self.sizes}
        self.records = records
        self.save_ctx = StoredNamespace() if mesh.size("pp") > 1 else Namespace()
        self.modules = nn.ModuleDict()
        self.shared = SharedModules(self.modules, mesh)
        self.debug = debug
        self.stages = Stages(root, mesh)
        self.pipeline = _pipeline_of(mesh, records, self.save_ctx, self.modules)
        self.dry = False
        self.seed = seed
        self.loss: Loss = loss
        self.batch_dim = batch_dim
        self.sequence_dim = sequence_dim
        self.zigzag = zigzag
        self.points: list[Point] = []
        self.active: frozenset[HookFunction] | None = None
        self.is_off: Callable[[HookFunction], bool] = lambda hook: False
        self.batch_sizes: tuple[int, ...] = ()
        self.batch = 0
        self.positions = 0
        self.trace: LayoutTrace | None = None
        self._depth = 0
        self._visits = 0
        self._handled: BaseException | None = None
        self._described: set[tuple[int, int]] = set()
        self._handles: list[Any] = []
        self._layer_handles: list[Any] = []
        self._entered: dict[str, tuple[torch.Size, dict[str, Mark]]] = {}
        self._shares_experts = False
        self._turn = threading.RLock()

    def is_active(self, hook: HookFunction) -> bool:
        """Whether a hook function runs in this forward."""
        return (self.active is None or hook in self.active) and not self.is_off(hook)

    @contextmanager
    def only(self, hooks: frozenset[HookFunction] | None) -> Iterator[None]:
        """Switch on these hook functions alone, while inside."""
        before, self.active = self.active, hooks
        try:
            yield
        finally:
            self.active = before

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One thread at a time: groups, layouts and random draws are those of one forward.

        Raises:
            RankDisagreementError: threads at once, of which other ranks may run another first.
        """
        if not self._turn.acquire(blocking=self.mesh.watch is None):
            raise RankDisagreementError(
                f"Rank {self.mesh.rank}: a second thread calls the FlexModel while it runs, and "
                "ranks cannot tell whose turn it is on the others. Call it from one thread."
            )
        try:
            yield
        finally:
            self._turn.release()

    def attach(self) -> None:
        """Follow the root's forwards, however they are started (``generate`` too)."""
        if not self.mesh.names:
            return
        if self.mesh.watch is not None:
            self.mesh.watch.attached(self, True)
        if self._handles:  # hooks on the root itself belong before its end
            self._handles.pop().remove()
        else:
            begin = nn.Module.register_forward_pre_hook(
                self.root, self._begin, with_kwargs=True, prepend=True
            )
            self._handles = [begin]
        end = nn.Module.register_forward_hook(self.root, self._end, always_call=True)
        self._handles.append(end)

    def detach(self) -> None:
        """Leave the root as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.close()
        if self.mesh.watch is not None:
            self.mesh.watch.attached(self, False)

    @contextmanager
    def between_hooks(self) -> Iterator[None]:
        """Hooks are off for a moment only: the other ranks need not make anything of it."""
        watch, token = self.mesh.watch, object()
        if watch is not None:
            watch.attached(token, True)
        try:
            yield
        finally:
            if watch is not None:
                watch.attached(token, False)

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

    @contextmanager
    def step(self, hooks: Mapping[HookFunction, str]) -> Iterator[None]:
        """One run of a pipeline's schedule, in which every stage has the same hooks."""
        if self.pipeline is None or self.mesh.assembly is None:
            yield
            return
        active = {hook: kind for hook, kind in hooks.items() if self.is_active(hook)}
        agree_on_hooks(self.mesh.assembly, self.mesh, [_label(h, k) for h, k in active.items()])
        self.stages.check_alike([hook.module_name for hook in active], self.pipeline.line)
        try:
            with self.pipeline.step(passes_on=any(h.editing_function for h in active)):
                yield
        except Exception as error:
            self.close()
            inner = raised_inside(error)
            told = self.failed("a step of the pipeline", inner)
            if told is error:
                raise
            raise told from (told.__cause__ if told is inner else inner)

    @uncompiled
    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._depth += 1
        if self._depth > 1 or in_backward():
            return
        self._handled = sys.exc_info()[1]
        if self.pipeline is not None:
            self.dry = not self.pipeline.begin_microbatch(self.root)
            if self.dry:
                return
        self.shared.begin_forward()
        active = [p for p in self.points if any(self.is_active(h) for h in p.hooks)]
        inputs = list(tensors_in((args, kwargs)))
        self._check_inputs(inputs if active else [])
        self._agree(active, inputs)
        first = _batched(inputs) if active and inputs else None
        self.batch = _length(first, self.batch_dim)
        self.positions = self._positions_in(first)
        unknown = [point for point in active if point.needs_trace()]
        for point in unknown:
            if point.before_trace is not None:
                point.before_trace()
        if unknown:
            self.attach()  # behind the observers that were just moved
            plain = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._watch(inputs, {id(tensor) for tensor in plain})

    @uncompiled
    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._depth = max(0, self._depth - 1)
        if self._depth > 0 or in_backward():
            return None
        self.close()
        self._tell_of_failure()
        if self.pipeline is None or self.dry or output is None:  # None after a failure
            return None
        return self.pipeline.end_microbatch(output)

    def _tell_of_failure(self) -> None:
        """A forward that ``generate`` began ends past FlexModel's own: here it can only be told."""
        error = sys.exc_info()[1]  # of the caller, if it handles one just now, or of this forward
        if isinstance(error, Exception) and error is not self._handled:
            told = self.failed("the model's forward", error)
            if told is not error and hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"{type(told).__name__}: {told}")
        self._handled = None

    def visit(self, label: str) -> None:
        """Note that a hook point is visited: the ranks compare the order they came by."""
        self._visits = zlib.crc32(label.encode(), self._visits)
        if self.mesh.watch is not None:
            self.mesh.watch.where = label

    def failed(self, where: str, error: Exception) -> Exception:
        """What to raise for an exception, after the other ranks have been told of it."""
        return error if self.mesh.watch is None else self.mesh.watch.failed(where, error)

    def _check_inputs(self, inputs: list[Tensor]) -> None:
        if inputs and self.sizes and torch._C._are_functorch_transforms_active():
            raise LayoutError(
                f"Rank {self.mesh.rank}: the model runs inside a torch.func transform, where no "
                "activation can be gathered over the ranks. Take gradients by torch.autograd, or "
                "call it with hook groups that are empty."
            )
        for tensor in inputs if self.sizes else ():
            if tensor.is_nested:
                raise LayoutError(
                    f"Rank {self.mesh.rank}: the model is given a nested tensor {tensor.shape}, of "
                    "which no size tells the batch. Pad the samples to one length."
                )

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
        self._shares_experts = shares_experts(self.root)
        groups = {name: self.mesh.group(name) for name in self.sizes}
        first, batch = _batched(inputs) if inputs else None, self.batch
        trace = LayoutTrace(groups, self.dtensor_marks, batch=batch)
        names = {id(p): n for n, p in named_parameters(self.root)}
        trace.mark_parameters(
            self.root, lambda tensor: self._parameter_marks(names.get(id(tensor)), tensor)
        )
        for tensor in inputs:
            is_plain = id(tensor) in plain or tensor is first
            trace.mark(tensor, self._input_marks(tensor, tensor is first, batch, is_plain))
        for tensor, placements in handed_over(self.root):
            trace.mark(tensor, {n: from_placement(p, tensor.ndim) for n, p in placements.items()})
        self.trace = trace
        self._watch_layers(trace)
        trace.start()

    def _parameter_marks(self, name: str | None, tensor: Tensor) -> Mapping[str, Mark]:
        placement = parameter_placement(self.root, name, tensor) if name else None
        return {"tp": from_placement(placement, tensor.ndim)} if placement else {}

    def _input_marks(self, tensor: Tensor, first: bool, batch: int, plain: bool) -> dict[str, Mark]:
        """Batch over dp, sequence over cp; whole over tp, but for what an earlier forward left."""
        at = self.batch_dim
        otherwise = WHOLE if plain else FOREIGN  # a cache
        fits = tensor.ndim > at and tensor.shape[at] == batch
        # A lone dim as long as the batch may as well be positions: it fits whatever it meets.
        positions = tensor.ndim == 1 and not first
        by_batch = WHOLE if not fits else FOREIGN if positions else Cut(at)
        by_sequence = self._sequence_mark(tensor, first, by_batch, otherwise)
        return {"tp": otherwise, "dp": by_batch, "cp": by_sequence}

    def _sequence_mark(self, tensor: Tensor, first: bool, by_batch: Mark, otherwise: Mark) -> Mark:
        """The dim as long as this rank's part of the sequence; FOREIGN where several may be."""
        fitting = [
            dim
            for dim, length in enumerate(tensor.shape)
            if length == self.positions and by_batch != Cut(dim)
        ]
        if first and self.sequence_dim in fitting:
            return Cut(self.sequence_dim)
        if not fitting:
            return otherwise
        return Cut(fitting[0]) if len(fitting) == 1 and by_batch is not FOREIGN else FOREIGN

    def _positions_in(self, first: Tensor | None) -> int:
        """How much of the sequence this rank holds, from the input that tells the batch.

        Raises:
            LayoutError: it is no whole number of chunks.
        """
        ranks = self.sizes.get("cp", 1)
        length = _length(first, self.sequence_dim) if ranks > 1 else 0
        if first is not None and self.zigzag and length % 2:
            raise LayoutError(
                f"Rank {self.mesh.rank} was given {length} entries along dim {self.sequence_dim} "
                f"of an input {tuple(first.shape)}, but in zig-zag order each of the {ranks} "
                "context-parallel ranks holds two chunks of one length. Pad the whole sequence to "
                f'a multiple of {2 * ranks}, pass context_order="contiguous" if each rank holds '
                "one piece of it, or name the dim of the sequence by sequence_dim."
            )
        return length

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


def _pipeline_of(
    mesh: ParallelMesh, records: Records, save_ctx: Namespace, modules: nn.ModuleDict
) -> Pipeline | None:
    if mesh.assembly is None or not isinstance(save_ctx, StoredNamespace):
        return None
    return Pipeline(Line(mesh, mesh.assembly), records, save_ctx, modules)


def _label(hook: HookFunction, kind: str) -> str:
    does = "edit" if hook.edit else "statistic" if hook.statistic else "retrieve"
    return f"{hook.module_name} {kind} {hook.unpack_idx} ({does})"


def _length(tensor: Tensor | None, dim: int) -> int:
    return tensor.shape[dim] if tensor is not None and tensor.ndim > dim else 0


def _batched(inputs: list[Tensor]) -> Tensor:
    """The input that tells the batch: one of a lone dim may hold positions."""
    return next((tensor for tensor in inputs if tensor.ndim > 1), inputs[0])


def _ranks_of(mesh: ParallelMesh, name: str) -> tuple[int, ...]:
    return tuple(torch.distributed.get_process_group_ranks(mesh.group(name)))
