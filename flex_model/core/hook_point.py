"""The way of one activation.

    module fires -> unpack -> layout here -> gather -> record -> edit -> re-shard -> repack

All hook functions of one kind on one tensor of one module share a hook point: it is gathered once,
passes through their editing functions in order of registration, and is re-sharded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from flex_model.core.compiled import uncompiled
from flex_model.core.editing import Editing
from flex_model.core.hook_function import HookFunction
from flex_model.core.not_copied import NotCopied
from flex_model.core.point_layout import PointLayout
from flex_model.core.randomness import RandomStreams, in_backward
from flex_model.core.selection import select
from flex_model.core.session import Session
from flex_model.core.unpacking import count_tensors, find_tensor
from flex_model.distributed.gradients import GradientMemory
from flex_model.errors import LayoutError
from flex_model.layouts.layout import ActivationLayout
from flex_model.layouts.trace import paused, running

__all__ = ["HookPoint", "Kind"]

Kind = Literal["forward", "forward_pre", "full_backward", "full_backward_pre", "tensor"]


@dataclass(frozen=True)
class PointKey:
    """What hook functions must share to share a hook point."""

    name: str
    kind: Kind
    index: int
    part: str | None = None
    head: int | None = None

    @property
    def label(self) -> str:
        """``layers.0.mlp forward 0``: for messages, digests and random streams."""
        return f"{self.name} {self.kind} {self.index}{self.selected}"

    @property
    def selected(self) -> str:
        """``:q``, ``:q.3`` or ``:3``, where the hook functions are on a part of the features."""
        chosen = [str(item) for item in (self.part, self.head) if item is not None]
        return f":{'.'.join(chosen)}" if chosen else ""


def _telling(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Let the other ranks know of what is raised, for they would wait for this one."""

    @wraps(callback)
    def told(point: HookPoint, *args: Any) -> Any:
        try:
            return callback(point, *args)
        except Exception as error:
            to_raise = point.failed(error)
            if to_raise is error:
                raise
            raise to_raise from error

    return uncompiled(told)


class HookPoint(NotCopied):
    """One tensor at one module's boundary, with the hook functions that visit it.

    Args:
        key: module name, kind and tensor index.
        module: the module, for editing functions.
        session: what all points share.
        record_key: where its records go in ``output_ptr``.
    """

    def __init__(self, key: PointKey, module: nn.Module, session: Session, record_key: str) -> None:
        self.key = key
        self.label = key.label
        self.record_key = record_key
        self.hooks: list[HookFunction] = []
        self._module = module
        self._session = session
        self._memory = GradientMemory(self.where)
        self._layouts = PointLayout(key.name, key.kind, key.index, module, session, self.where)
        streams = RandomStreams(session.seed, key.label)
        self._editing = Editing(module, session, self._memory, streams, self.where)
        self._positions: list[int] = []
        self.before_trace: Callable[[], None] | None = None

    @property
    def where(self) -> str:
        """Module, kind and rank, for messages."""
        return f"{self.key.name} ({self.key.kind}, rank {self._session.mesh.rank})"

    @property
    def gather_backwards(self) -> int:
        return self._memory.gather_backwards

    def add(self, hook: HookFunction) -> None:
        """Let a hook function visit this point, after those already here."""
        self._layouts.take_hints(hook)
        self.hooks.append(hook)

    def needs_trace(self) -> bool:
        return self._layouts.needs_trace()

    def failed(self, error: Exception) -> Exception:
        """What to raise for an exception at this point."""
        return self._session.failed(self.label, error)

    # -- what torch calls ------------------------------------------------------------------

    @_telling
    def on_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        active = self._active()
        if not active:
            return None
        if self._session.trace is not None:
            self._session.mark_output(self.key.name, module, output)
        found = find_tensor(output, self.key.index)
        if found is None:
            raise self._missing("returned", output)
        tensor, repack = found
        result = self._visit(tensor, active)
        return None if result is tensor else repack(result)

    @_telling
    def on_forward_pre(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        active = self._active()
        if not active:
            return None
        found = find_tensor((args, kwargs), self.key.index)
        if found is None:
            raise self._missing("was called with", (args, kwargs))
        tensor, repack = found
        result = self._visit(tensor, active)
        return None if result is tensor else repack(result)

    @_telling
    def on_gradients(
        self, module: nn.Module, grad_input: Any, grad_output: Any = None
    ) -> tuple[Tensor | None, ...] | None:
        """Both full backward hooks: torch passes what may be replaced first."""
        active = self._active()
        gradients = grad_input if isinstance(grad_input, tuple) else (grad_input,)
        if not active or not self._positions:
            return None
        at = self._positions[self.key.index]
        gradient = gradients[at]
        if gradient is None:  # nothing flows here: there is neither a value nor a shape to edit
            return None
        result = self._visit(gradient, active, transposed=True)
        if result is gradient:
            return None
        return (*gradients[:at], result, *gradients[at + 1 :])

    @_telling
    def on_parameter_gradient(self, gradient: Tensor) -> Tensor | None:
        active = self._active()
        if not active:
            return None
        result = self._visit(gradient, active, transposed=True)
        return None if result is gradient else result

    @uncompiled
    def observe(self, module: nn.Module, args: Any, output: Any = None) -> None:
        """In forward, learn the layout of the tensor whose gradient this point will see."""
        if not self._active() or self._session.dry:
            return
        if self.key.kind == "full_backward_pre" and self._session.trace is not None:
            self._session.mark_output(self.key.name, module, output)
        side = args if self.key.kind == "full_backward" else output
        tree = side if isinstance(side, tuple) else (side,)
        self._positions = [i for i, item in enumerate(tree) if isinstance(item, Tensor)]
        if not -len(self._positions) <= self.key.index < len(self._positions):
            raise self._missing(
                "has, as positional inputs or outputs that torch gives gradients of,", tree
            )
        tensor = tree[self._positions[self.key.index]]
        with paused():
            self._layouts.of(tensor)

    # -- the way of one activation ---------------------------------------------------------

    def _active(self) -> list[HookFunction]:
        return [hook for hook in self.hooks if self._session.is_active(hook)]

    def _visit(
        self, tensor: Tensor, active: Sequence[HookFunction], transposed: bool = False
    ) -> Tensor:
        """Capture and edit a tensor; a gradient (``transposed``) by its own placements."""
        if self._session.dry:
            return self._as_edited(tensor, active)
        self._session.visit(self.label)
        traces = running()  # of the FlexModels around this model
        if not traces:
            return self._processed(tensor, active, transposed)
        with paused():
            result = self._processed(tensor, active, transposed)
        for trace in () if result is tensor or transposed else traces:
            marks = trace.marks_of(tensor)
            if trace is self._session.trace:
                marks = self._layouts.marks_of(self._layouts.of(tensor), result.ndim)
            trace.mark(result, marks)
        return result

    def _as_edited(self, tensor: Tensor, active: Sequence[HookFunction]) -> Tensor:
        """In a call that only finds out shapes: what an edit may make of a tensor, and no more."""
        trains = any(p.requires_grad for p in self._session.modules.parameters())
        edits = any(hook.edit is not None for hook in active)
        takes = tensor.is_floating_point() and not tensor.requires_grad
        return tensor.detach().requires_grad_() if trains and edits and takes else tensor

    def _processed(
        self, tensor: Tensor, active: Sequence[HookFunction], transposed: bool
    ) -> Tensor:
        self._check_values(tensor)
        if isinstance(tensor, DTensor):
            tensor = _reduced(tensor)
        layout = self._layouts.of(tensor, gradient=transposed)
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if transposed:
            layout = self._memory.measured(layout, local, self._session.mesh).transposed()
        elif not layout.told:
            layout = self._memory.known(layout)
        if self.key.selected:
            return self._processed_part(tensor, local, layout, active, transposed)
        edited = self._passed(local, layout, active, transposed)
        return tensor if edited is local else _like(edited, tensor)

    def _processed_part(
        self,
        tensor: Tensor,
        local: Tensor,
        layout: ActivationLayout,
        active: Sequence[HookFunction],
        transposed: bool,
    ) -> Tensor:
        """The same for a part of the features, which is put back where it was taken."""
        width = layout.whole_shape(local.shape)[-1]
        positions = self._layouts.part(self.key.part, self.key.head, width)
        selected = select(local, layout, positions, self._session.mesh, self._memory)
        edited = self._passed(selected.local, selected.layout, active, transposed)
        return tensor if edited is selected.local else _like(selected.put_back(edited), tensor)

    def _passed(
        self,
        local: Tensor,
        layout: ActivationLayout,
        active: Sequence[HookFunction],
        transposed: bool,
    ) -> Tensor:
        """Record and edit; ``local`` itself where nothing changed."""
        edits = [hook.edit for hook in active if hook.edit is not None]
        recompute = not transposed and in_backward()
        records = not recompute and self._session.stages.records(self.key.name)
        if not recompute:
            self._show(local, layout, active)
        if records:
            self._take_statistics(local, layout, active)
        recorded = records and any(hook.recorded for hook in active)

        def record(whole: Tensor | None) -> None:
            if recorded and whole is not None:
                self._session.records.store(self.record_key, whole)
            elif recorded:
                self._session.records.collect(self.record_key, local, layout)

        if not edits:
            record(None)
            return local
        return self._editing.edit(local, layout, edits, record, recompute=recompute)

    def _show(
        self, local: Tensor, layout: ActivationLayout, active: Sequence[HookFunction]
    ) -> None:
        for hook in active:
            if hook.observer is not None:
                self._editing.observe(local, layout, hook.observer)

    def _take_statistics(
        self, local: Tensor, layout: ActivationLayout, active: Sequence[HookFunction]
    ) -> None:
        for hook in active:
            if hook.statistic is not None:
                found = self._editing.statistic(local, layout, hook.statistic)
                self._session.records.store(hook.record_key(self.record_key), found)

    def _check_values(self, tensor: Tensor) -> None:
        """Refuse a tensor that holds no values, or not one for every entry."""
        spread = bool(self._session.sizes)
        if tensor.is_meta:
            why, way_out = "on the meta device and has no values", "Give the model real inputs"
        elif spread and (tensor.layout is not torch.strided or tensor.is_nested):
            why = f"{'nested' if tensor.is_nested else tensor.layout} and cannot be gathered"
            way_out = "Hook a module that deals in dense tensors"
        elif spread and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            why = "inside a torch.func transform and cannot be gathered over the ranks"
            way_out = "Take gradients by torch.autograd"
        else:
            return
        raise LayoutError(
            f"{self.where}: the activation {tuple(tensor.shape)} is {why}. {way_out}, or leave the "
            "hook out by its group."
        )

    def _missing(self, verb: str, tree: Any) -> LayoutError:
        kinds = [type(item).__name__ for item in (tree if isinstance(tree, tuple) else (tree,))]
        return LayoutError(
            f"{self.where}: unpack_idx={self.key.index}, but the module {verb} "
            f"{count_tensors(tree)} tensors (in {', '.join(kinds) or 'nothing'}). unpack_idx "
            "counts them from 0, or from -1 back; what is no tensor cannot be hooked."
        )


def _reduced(tensor: DTensor) -> DTensor:
    """Terms of a sum added up, by DTensor itself (a vocabulary-parallel embedding has a mask).

    The module hands the sum on, for adding up twice would move it twice.
    """
    if not any(placement.is_partial() for placement in tensor.placements):
        return tensor
    return tensor.redistribute(
        placements=[Replicate() if p.is_partial() else p for p in tensor.placements]
    )


def _like(edited: Tensor, tensor: Tensor) -> Tensor:
    """A DTensor again, if the module dealt in one."""
    if not isinstance(tensor, DTensor):
        return edited
    return DTensor.from_local(
        edited,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
