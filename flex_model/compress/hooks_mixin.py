"""Hooks that belong to whoever registered them, so that they can be paused and taken off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, PrivateAttr
from torch import Tensor, nn

from flex_model.core.flex_model import FlexModel
from flex_model.core.hook_function import HookFunction
from flex_model.core.hook_point import Kind
from flex_model.errors import CompressionError

__all__ = ["Handle", "HooksMixin"]

HookType = Literal["forward", "forward_pre", "full_backward", "full_backward_pre", "tensor"]


class Handle(Protocol):
    """What takes a hook off."""

    def remove(self) -> None: ...


class _FlexHandle:
    """A FlexModel's hook function; it may have been taken off by others."""

    def __init__(self, model: FlexModel, hook: HookFunction) -> None:
        self.model, self.hook = model, hook

    def remove(self) -> None:
        if self.model.has_hook(self.hook):
            self.model.remove_hook(self.hook)


class HooksMixin(BaseModel):
    """Owns hooks: torch's on modules and parameters, and hook functions of a FlexModel.

    Nothing is shared between owners: `disable_hooks` pauses the hooks of one.
    """

    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, validate_assignment=True
    )

    _handles: list[Handle] = PrivateAttr(default_factory=list)
    _disabled: int = PrivateAttr(default=0)

    @property
    def hook_group(self) -> str:
        """The FlexModel's hook group of what is registered here."""
        return f"{type(self).__name__} {id(self)}"

    def register_hook(
        self,
        target: nn.Module | Tensor,
        hook: Callable[..., Any],
        hook_type: HookType = "forward",
        **kwargs: Any,
    ) -> Handle:
        """Register a torch hook that is passed over while hooks are disabled.

        Args:
            target: a module; a parameter for ``"tensor"``.
            hook: as torch calls it.
            hook_type: "forward", "forward_pre", "full_backward", "full_backward_pre" or "tensor".
            **kwargs: for torch's ``register_*_hook``.

        Raises:
            CompressionError: no such kind, or a parameter that gets no gradient.
        """

        @wraps(hook)
        def unless_disabled(*args: Any, **given: Any) -> Any:
            return None if self._disabled else hook(*args, **given)

        if hook_type == "tensor":
            return self._own(_trained(target).register_hook(unless_disabled))
        if hook_type not in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
            raise CompressionError(f"There is no hook type {hook_type!r}.")
        if not isinstance(target, nn.Module):
            raise CompressionError(
                f"A {hook_type} hook is on a module, not on a {type(target).__name__}."
            )
        register = getattr(nn.Module, f"register_{hook_type}_hook")
        return self._own(register(target, unless_disabled, **kwargs))

    def register_flex_hook(
        self, model: FlexModel, hook: HookFunction, hook_type: Kind = "forward"
    ) -> Handle:
        """Register a hook function with a FlexModel, in the group `hook_group`.

        Raises:
            RegistrationError: see `FlexModel.register_forward_hook`.
        """
        name = "register_hook" if hook_type == "tensor" else f"register_{hook_type}_hook"
        getattr(model, name)(hook)
        return self.adopt_hook(model, hook)

    def adopt_hook(self, model: FlexModel, hook: HookFunction) -> Handle:
        """Own a hook function that is registered already."""
        model.update_hook_groups(hook, self.hook_group)
        if self._disabled:
            model.switch_hook_groups(self.hook_group, on=False)
        return self._own(_FlexHandle(model, hook))

    @contextmanager
    def disable_hooks(self) -> Iterator[None]:
        """Pass over every hook owned here while inside. It nests: the outermost ends it."""
        self._disabled += 1
        self._switch(on=False)
        try:
            yield
        finally:
            self._disabled -= 1
            self._switch(on=not self._disabled)

    def remove_hooks(self) -> None:
        """Take every hook off."""
        self._switch(on=True)
        while self._handles:
            self._handles.pop().remove()

    def _own(self, handle: Handle) -> Handle:
        self._handles.append(handle)
        return handle

    def _switch(self, on: bool) -> None:
        """The FlexModels' part of it; torch's hooks look for themselves."""
        for handle in self._handles:
            if isinstance(handle, _FlexHandle) and handle.model.has_hook(handle.hook):
                handle.model.switch_hook_groups(self.hook_group, on)


def _trained(target: nn.Module | Tensor) -> Tensor:
    """A parameter that gets a gradient."""
    if not isinstance(target, Tensor):
        raise CompressionError(
            f"A tensor hook is on a parameter, not on a {type(target).__name__}."
        )
    why = None
    if target.is_meta:
        why = "is on the meta device and holds no values: load the model first"
    elif not target.requires_grad:
        why = "is frozen (requires_grad=False), so no gradient ever reaches it: thaw it first"
    if why is not None:
        raise CompressionError(
            f"A hook on a parameter {tuple(target.shape)} would never run: it {why}."
        )
    return target
