"""The layout of every tensor that passes a module's boundary, found in one forward, with no hook.

What hook points ask of a `Session` is asked here without visiting anything: nothing is gathered,
and what cannot be told is kept beside the rest instead of being raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flex_model.core.hook_function import HookFunction
from flex_model.core.point_layout import PointLayout
from flex_model.core.records import Records
from flex_model.core.session import Session
from flex_model.core.unpacking import tensors_in
from flex_model.distributed.mesh import ParallelMesh
from flex_model.errors import FlexModelError
from flex_model.layouts.layout import ActivationLayout
from flex_model.layouts.names import named_modules

__all__ = ["Boundary", "boundaries"]


@dataclass(frozen=True)
class Boundary:
    """A tensor that a module takes or returns.

    Attributes:
        module: the module's name.
        kind: "forward_pre" for its first input, "forward" for an output.
        index: which output.
        shape: sizes on this rank.
        dtype: of its elements.
        layout: how it lies; None where nothing told.
        refused: why, then.
    """

    module: str
    kind: str
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: ActivationLayout | None
    refused: str = ""

    @property
    def whole(self) -> tuple[int, ...]:
        """Sizes of the whole tensor; this rank's where nothing told."""
        return tuple(self.layout.whole_shape(self.shape)) if self.layout else self.shape


def boundaries(root: nn.Module, mesh: ParallelMesh, forward: Callable[[], Any]) -> list[Boundary]:
    """Every module's first input and its outputs, in the order in which they passed.

    Args:
        root: the model on this rank.
        mesh: the job's ranks.
        forward: calls the model.
    """
    session = Session(
        root, mesh, Records({}, "first", mesh), seed=0, loss="mean", batch_dim=0, sequence_dim=1
    )
    watcher = _Watcher(session)
    with watcher.on(root):
        session.attach()
        try:
            forward()
        finally:
            session.detach()
    return watcher.found


@dataclass
class _Point:
    """What the session needs of a hook point."""

    label: str
    layout: PointLayout
    hooks: list[HookFunction]
    gather_backwards: int = 0
    before_trace: Callable[[], None] | None = None

    def needs_trace(self) -> bool:
        return self.layout.needs_trace()


@dataclass
class _Watcher:
    session: Session
    found: list[Boundary] = field(default_factory=list)
    _points: dict[tuple[str, str, int], _Point] = field(default_factory=dict)

    @contextmanager
    def on(self, root: nn.Module) -> Iterator[None]:
        """Watch every module of the model, while inside."""
        handles = []
        for name, module in named_modules(root):
            for kind in ("forward_pre", "forward"):
                self._point(name, kind, 0, module)
            entered, left = partial(self._entered, name), partial(self._left, name)
            handles.append(module.register_forward_pre_hook(entered, with_kwargs=True))
            handles.append(module.register_forward_hook(left))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entered(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensor = next(tensors_in((args, kwargs)), None)
        if tensor is not None:
            self._note(name, "forward_pre", 0, module, tensor)

    def _left(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.session.mark_output(name, module, output)
        for index, tensor in enumerate(tensors_in(output)):
            self._note(name, "forward", index, module, tensor)

    def _note(self, name: str, kind: str, index: int, module: nn.Module, tensor: Tensor) -> None:
        point, trace = self._point(name, kind, index, module), self.session.trace
        layout, refused = None, ""
        with nullcontext() if trace is None else trace.paused():
            try:
                layout = point.layout.of(tensor)
            except FlexModelError as error:
                refused = str(error)
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        shape = tuple(local.shape)
        self.found.append(Boundary(name, kind, index, shape, local.dtype, layout, refused))

    def _point(self, name: str, kind: str, index: int, module: nn.Module) -> _Point:
        key = (name, kind, index)
        if key not in self._points:
            where = f"{name} ({kind})"
            layout = PointLayout(name, kind, index, module, self.session, where)
            self._points[key] = _Point(f"{name} {kind} {index}", layout, [HookFunction(name)])
            self.session.points.append(self._points[key])
        return self._points[key]
