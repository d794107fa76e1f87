"""Which hook functions are on which modules, and how to take them all off again."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from flex_model.core.arguments import check_hookable, check_request
from flex_model.core.compiled import compile_anew
from flex_model.core.hook_function import HookFunction
from flex_model.core.hook_point import HookPoint, Kind, PointKey
from flex_model.core.parameters import unhookable
from flex_model.core.point_layout import side_of
from flex_model.core.session import Session
from flex_model.errors import RegistrationError, UnknownModuleError
from flex_model.layouts.experts import refused
from flex_model.layouts.fused import chosen_features
from flex_model.layouts.names import named_modules, named_parameters, plain_name

__all__ = ["KINDS", "HookRegistry", "unknown_name"]

KINDS: tuple[Kind, ...] = (
    "forward",
    "forward_pre",
    "full_backward",
    "full_backward_pre",
    "tensor",
)


class HookRegistry:
    """The hook points of one wrapped model.

    Hook functions of one kind on one tensor of one module share a `HookPoint`. Everything
    done to the model is noted with what undoes it.
    """

    def __init__(self, root: nn.Module, session: Session) -> None:
        self._root = root
        self._session = session
        self._points: dict[PointKey, HookPoint] = {}
        self._record_keys: dict[PointKey, str] = {}
        self._kinds: dict[HookFunction, Kind] = {}
        self._undo: dict[PointKey, list[Callable[[], None]]] = {}

    @property
    def kinds(self) -> dict[HookFunction, Kind]:
        """Every registered hook function with its kind, in order of registration."""
        return dict(self._kinds)

    def check(self, hook: HookFunction, kind: Kind) -> None:
        """Refuse what cannot be registered, before anything changes.

        Raises:
            UnknownModuleError: the wrapped model has no such module or parameter.
            RegistrationError: no HookFunction, one that is registered already, no such kind, a
                parameter that gets no gradient, or an activation that no one process has.
        """
        if not isinstance(hook, HookFunction):
            raise RegistrationError(f"Expected a HookFunction, got {type(hook).__name__}.")
        if kind not in KINDS:
            raise RegistrationError(f"There is no hook type {kind!r}; there are {KINDS}.")
        if hook in self._kinds:
            raise RegistrationError(
                f"{hook!r} is registered already. Make another HookFunction for another place."
            )
        check_request(hook.module_name, hook.editing_function, hook.unpack_idx)
        self._check_target(hook.module_name, kind)
        self._check_part(hook, kind)
        name = plain_name(hook.module_name, self._root)
        why = refused(self._root, name, self._session.sizes, parameter=kind == "tensor")
        if why is not None:
            raise RegistrationError(
                f"{name} ({kind}, rank {self._session.mesh.rank}) cannot be hooked: {why}"
            )

    def register(self, hook: HookFunction, kind: Kind) -> None:
        """Let a hook function visit its module (or parameter). Raises as `check` does.

        Where another pipeline stage holds the module, only its place is noted.
        """
        self.check(hook, kind)
        key = self._key_of(hook, kind)
        record_key = self._record_keys.get(key) or self._record_key_for(hook, kind)
        target = self._target(hook.module_name, kind)
        if target is not None:
            self._visit_from(key, record_key, hook, *target)
        self._record_keys[key] = record_key
        self._kinds[hook] = kind
        self._session.attach()

    def _visit_from(
        self,
        key: PointKey,
        record_key: str,
        hook: HookFunction,
        module: nn.Module,
        tensor: Tensor | None,
    ) -> None:
        if key in self._points:
            self._points[key].add(hook)
            return
        point = HookPoint(key, module, self._session, record_key)
        point.add(hook)
        self._attach(point, module, tensor)
        self._points[key] = point
        self._session.points.append(point)

    def record_key(self, hook: HookFunction) -> str:
        """Where a registered hook function's records are found."""
        return hook.record_key(self._record_keys[self._key_of(hook, self._kinds[hook])])

    def clear(self) -> None:
        """Take every hook off: the model is as it was before the first was registered."""
        self._session.detach()
        if self._undo:
            compile_anew(self, hooked=False)
        for key in reversed([*self._undo]):
            self._take_off(key)
        self._points.clear()
        self._record_keys.clear()
        self._kinds.clear()
        self._session.points.clear()

    def remove(self, hook: HookFunction) -> None:
        """Take one hook function off. With the last of a hook point the point goes too."""
        key = self._key_of(hook, self._kinds.pop(hook))
        if not any(self._key_of(other, kind) == key for other, kind in self._kinds.items()):
            del self._record_keys[key]
        point = self._points.get(key)
        if point is None:  # on another pipeline stage
            return
        point.hooks.remove(hook)
        if not point.hooks:
            self._session.points.remove(self._points.pop(key))
            compile_anew(self, hooked=bool(self._points))
            self._take_off(key)

    def _take_off(self, key: PointKey) -> None:
        undo = self._undo.pop(key)
        while undo:
            undo.pop()()

    def _key_of(self, hook: HookFunction, kind: Kind) -> PointKey:
        name = plain_name(hook.module_name, self._root)
        return PointKey(name, kind, hook.unpack_idx, hook.part, hook.head)

    def _check_target(self, name: str, kind: Kind) -> None:
        name, stages = plain_name(name, self._root), self._session.stages
        is_parameter = kind == "tensor"
        if not stages.holding(name, parameter=is_parameter):
            names = stages.names(parameters=is_parameter)
            raise unknown_name("parameter" if is_parameter else "module", name, names)
        if not is_parameter:
            stages.check_whole(name)
            module = dict(named_modules(self._root)).get(name)
            if module is not None:
                check_hookable(f"{name or 'The model'} (rank {self._session.mesh.rank})", module)
            return
        parameter = dict(named_parameters(self._root)).get(name)
        reason = None if parameter is None else unhookable(self._root, name, parameter)
        if reason is not None:
            raise RegistrationError(f"Parameter {name} {reason}.")

    def _check_part(self, hook: HookFunction, kind: Kind) -> None:
        key = self._key_of(hook, kind)
        if not key.selected:
            return
        if kind == "tensor":
            raise RegistrationError(
                f"{hook!r}: a parameter has no part or head of its own to hook."
            )
        if key.name in dict(named_modules(self._root)):
            chosen_features(self._root, key.name, side_of(kind), hook.part, hook.head)

    def _target(self, name: str, kind: Kind) -> tuple[nn.Module, Tensor | None] | None:
        """The module to hook, and for a parameter the tensor; None where another stage has it."""
        name = plain_name(name, self._root)
        modules = dict(named_modules(self._root))
        if kind == "tensor":
            parameter = dict(named_parameters(self._root)).get(name)
            owner = modules.get(name.rpartition(".")[0])
            return None if parameter is None or owner is None else (owner, parameter)
        return (modules[name], None) if name in modules else None

    def _attach(self, point: HookPoint, module: nn.Module, tensor: Tensor | None) -> None:
        # torch's own methods: where the module is a FlexModel, its take HookFunctions.
        handles: list[Any] = []
        kind, undo = point.key.kind, self._undo.setdefault(point.key, [])
        if tensor is not None:
            handles.append(tensor.register_hook(point.on_parameter_gradient))
        elif kind == "forward":
            handles.append(nn.Module.register_forward_hook(module, point.on_forward))
        elif kind == "forward_pre":
            pre = partial(nn.Module.register_forward_pre_hook, module, with_kwargs=True)
            handles.append(pre(point.on_forward_pre))
        else:
            undo.append(_restorer_of_backward_flag(module))
            inputs = kind == "full_backward"
            register = (
                nn.Module.register_forward_pre_hook if inputs else nn.Module.register_forward_hook
            )
            observer = _Last(partial(register, module), point.observe)
            point.before_trace = observer.move
            handles.append(observer)
            handles.append(
                nn.Module.register_full_backward_hook(module, point.on_gradients)
                if inputs
                else nn.Module.register_full_backward_pre_hook(module, point.on_gradients)
            )
        undo.extend(handle.remove for handle in handles)
        compile_anew(self, hooked=True)

    def _record_key_for(self, hook: HookFunction, kind: Kind) -> str:
        taken, selected = self._record_keys.values(), self._key_of(hook, kind).selected
        if f"{hook.module_name}{selected}" not in taken:
            return f"{hook.module_name}{selected}"
        index = f"[{hook.unpack_idx}]" if hook.unpack_idx else ""
        return f"{hook.module_name}:{kind}{index}{selected}"


class _Last:
    """A hook that can be moved behind those registered since.

    torch takes gradients at a module's boundary behind all its other hooks, so that is where their
    tensors must be looked at.
    """

    def __init__(self, register: Callable[..., Any], hook: Callable[..., Any]) -> None:
        self._register = register
        self._hook = hook
        self._handle = register(hook)

    def move(self) -> None:
        """Be the last again."""
        self._handle.remove()
        self._handle = self._register(self._hook)

    def remove(self) -> None:
        self._handle.remove()


def unknown_name(what: str, name: str, known: Iterable[str]) -> UnknownModuleError:
    """The error for a name the model does not have, with the nearest it has."""
    nearest = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    hint = f" Nearest: {', '.join(nearest)}." if nearest else ""
    return UnknownModuleError(f"The wrapped model has no {what} {name!r}.{hint}")


def _restorer_of_backward_flag(module: nn.Module) -> Callable[[], None]:
    """torch marks a module that ever had a full backward hook and never takes the mark off."""

    def hooked() -> bool:
        return bool(module._backward_hooks or module._backward_pre_hooks)

    before = None if hooked() else module._is_full_backward_hook

    def restore() -> None:
        if not hooked():  # else the mark is still somebody's
            module._is_full_backward_hook = before

    return restore
