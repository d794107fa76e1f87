"""What editing functions store in ``save_ctx``, on its way from one pipeline stage to the next.

A stage hands on what has changed, so that of a list to which several stages append, microbatch by
microbatch, each entry arrives once and in its place. What one process would have and stages cannot
(a number that two of them add to, each from its own last one) is refused.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from flex_model.errors import EditError

__all__ = [
    "MISSING",
    "Changes",
    "Path",
    "Stored",
    "StoredNamespace",
    "combined",
    "guarded",
    "packed",
    "paths",
    "spelled",
    "travelling",
]

# ("set", value), ("extend", items appended to a list), ("update", a Change of each key of a dict
# that has one) or ("gone", None).
Change = tuple[str, Any]
Changes = dict[str, Change]  # by name
Path = tuple[Any, ...]  # a name, and keys of dicts below it

MISSING = object()
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class StoredNamespace(Namespace):
    """The users' namespace, which notes what is written, and what is read before."""

    __slots__ = ("_read", "_written")

    def __init__(self) -> None:
        object.__setattr__(self, "_read", set())
        object.__setattr__(self, "_written", set())
        super().__init__()

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in self._written:
            self._read.add(name)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._written.add(name)
        super().__setattr__(name, value)


class Stored:
    """The changes to a namespace since it was last looked at.

    Args:
        namespace: the users'.
    """

    def __init__(self, namespace: StoredNamespace) -> None:
        self.values = vars(namespace)
        self._namespace = namespace
        self._seen: dict[str, Any] = {}
        self.look()

    @property
    def read(self) -> set[str]:
        """The names that were read, before they were written if they were."""
        return set(self._namespace._read)

    def look(self) -> dict[str, Any]:
        """Remember how everything is now, which is returned too."""
        self._seen = {name: _copied(value) for name, value in self.values.items()}
        self._namespace._read.clear()
        self._namespace._written.clear()
        return self._seen

    def changes(self, since: Mapping[str, Any] | None = None) -> Changes:
        """What is otherwise than at the last look, or at an earlier one."""
        seen = self._seen if since is None else since
        found = {name: _change(seen, name, value) for name, value in self.values.items()}
        found |= dict.fromkeys(seen.keys() - self.values.keys(), ("gone", None))
        for name in self._namespace._written & self.values.keys():  # be it by the same object
            found[name] = found[name] or ("set", self.values[name])
        return {name: change for name, change in found.items() if change is not None}

    def take(self, changes: Changes) -> None:
        """Make these changes here too."""
        for name, change in changes.items():
            _apply(self.values, name, change)

    def at(self, path: Path) -> Any:
        """The value at a path; MISSING where there is none."""
        found: Any = self.values
        for key in path:
            found = found.get(key, MISSING) if isinstance(found, dict) else MISSING
        return found

    def put(self, path: Path, value: Any) -> None:
        """Set the value at a path, or take it away, if there is something around it."""
        *around, key = path
        owner = self.at(tuple(around)) if around else self.values
        if isinstance(owner, dict):
            _apply(owner, key, ("gone", None) if value is MISSING else ("set", value))

    def replace(self, values: Mapping[str, Any]) -> None:
        """Set names, in the lists and dicts that are there already, which others may hold."""
        for name, value in values.items():
            own = self.values.get(name)
            if type(own) is list and type(value) is list:
                own[:] = value
            elif isinstance(own, dict) and type(value) is dict:
                own.clear()
                own.update(value)
            else:
                self.put((name,), value)


def paths(changes: Changes) -> set[Path]:
    """Where a value was replaced, or taken away."""
    return {path for name, change in changes.items() for path in _paths(change, (name,))}


def combined(first: Changes, then: Changes) -> Changes:
    """One change for two in turn."""
    both = dict(first)
    for name, change in then.items():
        both[name] = _joined(both[name], change) if name in both else change
    return both


def travelling(changes: Changes, *, told: bool = False) -> Changes:
    """Changes as they travel; see `packed`."""
    return {n: _travelling(change, f"save_ctx.{n}", told) for n, change in changes.items()}


def _travelling(change: Change, where: str, told: bool) -> Change:
    kind, content = change
    if kind == "update":
        inside = content.items()
        return kind, {key: _travelling(inner, f"{where}[{key!r}]", told) for key, inner in inside}
    return kind, packed(content, where, told=told)


def guarded(changes: Changes) -> Changes:
    """Changes that have come from another stage, which no gradient can go back to.

    Where one process would have one, it is refused when it comes.
    """
    return {
        name: tree_map_only(Tensor, partial(_guarded, f"save_ctx.{name}"), change)
        for name, change in changes.items()
    }


def _guarded(where: str, tensor: Tensor) -> Tensor:
    if not tensor.requires_grad:
        return tensor
    tensor.register_hook(partial(_refuse_gradient, where))
    return tensor.clone()  # which may be changed in place, as what was stored


def _refuse_gradient(where: str, gradient: Tensor) -> None:
    raise EditError(
        f"A gradient flows back into {where}, which an earlier pipeline stage has stored: stored "
        "values pass between stages, their autograd graphs do not. Store it detached if no "
        "gradient is to flow; else read it on the stage that stores it."
    )


def packed(value: Any, where: str, *, told: bool = False) -> Any:
    """A value as it travels: plain containers of numbers, strings and detached CPU tensors.

    Autograd graphs stay behind, and of a view the rest of what it looks at.

    Args:
        value: what is stored.
        where: its name, for messages.
        told: whether the other side is to know that there is a graph.

    Raises:
        EditError: something else is in it, named by where it was found.
    """
    if isinstance(value, Tensor) and not isinstance(value, DTensor):
        return _compact(value).requires_grad_(told and value.requires_grad)
    if isinstance(value, dict):
        return {
            packed(key, f"a key of {where}"): packed(inner, f"{where}[{key!r}]", told=told)
            for key, inner in value.items()
        }
    if type(value) in (list, tuple):
        inside = (packed(inner, f"{where}[{i}]", told=told) for i, inner in enumerate(value))
        return type(value)(inside)
    if type(value) is set:
        return {packed(inner, f"an entry of {where}") for inner in value}
    if type(value) in _PLAIN:
        return value
    raise EditError(
        f"{where} is a {type(value).__name__}, which cannot pass between pipeline stages. Store "
        "tensors, numbers, strings, and lists, tuples and dicts of them."
    )


def _compact(tensor: Tensor) -> Tensor:
    whole = tensor.detach().cpu()
    if whole.layout is not torch.strided:
        return whole
    own = whole.numel() * whole.element_size()
    return whole.clone() if whole.untyped_storage().nbytes() > own else whole


# -- looking ---------------------------------------------------------------------------------


def _copied(value: Any) -> Any:
    """A value as it was, whatever is done in place to it: containers copied, tensors numbered.

    It holds on to what it has seen, so that nothing new can be taken for it.
    """
    if type(value) is list:
        return value, [_copied(item) for item in value]
    if isinstance(value, dict):
        return value, {key: _copied(item) for key, item in value.items()}
    if type(value) is set:
        return value, frozenset(value)
    return value, _version(value)


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _same(seen: tuple[Any, Any], value: Any) -> bool:
    before, inside = seen
    if before is not value:
        return False
    if type(value) is list:
        return len(inside) == len(value) and all(map(_same, inside, value))
    if isinstance(value, dict):
        return inside.keys() == value.keys() and all(_same(inside[k], value[k]) for k in value)
    return inside == value if type(value) is set else inside == _version(value)


def _change(seen: Mapping[Any, Any], key: Any, value: Any) -> Change | None:
    """How the entry of a mapping has changed."""
    if key not in seen or seen[key][0] is not value:
        return "set", value
    inside = seen[key][1]
    if type(value) is list and len(inside) <= len(value) and all(map(_same, inside, value)):
        return ("extend", value[len(inside) :]) if len(inside) < len(value) else None
    if isinstance(value, dict) and inside.keys() <= value.keys():
        found = {k: _change(inside, k, v) for k, v in value.items()}
        changed = {k: change for k, change in found.items() if change is not None}
        return ("update", changed) if changed else None
    return None if _same(seen[key], value) else ("set", value)


# -- changing --------------------------------------------------------------------------------


def _apply(values: dict[Any, Any], key: Any, change: Change) -> None:
    kind, content = change
    if kind == "gone":
        values.pop(key, None)
    elif kind == "extend" and type(values.get(key)) is list:
        values[key].extend(content)
    elif kind == "update":
        inner = values.get(key)
        if not isinstance(inner, dict):
            inner = values[key] = {}
        for name, change_inside in content.items():
            _apply(inner, name, change_inside)
    else:
        values[key] = content


def _joined(first: Change, then: Change) -> Change:
    kinds = first[0], then[0]
    if kinds == ("extend", "extend"):
        return "extend", [*first[1], *then[1]]
    if kinds == ("update", "update"):
        return "update", combined(first[1], then[1])
    # What was set is the very container that has grown since.
    return first if first[0] == "set" and then[0] in ("extend", "update") else then


def _paths(change: Change, at: Path) -> Iterator[Path]:
    kind, content = change
    if kind == "update":
        for key, inside in content.items():
            yield from _paths(inside, (*at, key))
    elif kind != "extend":
        yield at


def spelled(path: Iterable[Any]) -> str:
    """``save_ctx.norms['layers.0']``."""
    name, *keys = path
    return f"save_ctx.{name}" + "".join(f"[{key!r}]" for key in keys)
