"""Finding one tensor in whatever a module takes or returns, and putting its successor back.

torch's pytree opens tuples, lists, dicts, namedtuples and every registered type (transformers
registers its ``ModelOutput``). Two kinds of objects are opened here besides: dataclasses, and
key/value caches (objects with a ``layers`` list whose items hold tensors).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["count_tensors", "find_tensor", "tensors_in"]

# What key/value caches keep their tensors in, outermost first; a dict's keys() is no tensor.
_CACHES = (("self_attention_cache", "cross_attention_cache"), ("layers",), ("keys", "values"))

Repack = Callable[[Tensor], Any]


def find_tensor(tree: Any, index: int) -> tuple[Tensor, Repack] | None:
    """The ``index``-th tensor of ``tree`` in order, and a function that puts another in its place.

    Args:
        tree: anything a module takes or returns.
        index: which tensor, counting tensors only; negative counts from the end.

    Returns:
        The tensor and its repacker, or None where the tree holds fewer tensors. The repacker
        returns a new tree of the same types; a cache is changed in place, as its owner does.
    """
    if isinstance(tree, Tensor):
        return (tree, _itself) if index in (0, -1) else None
    if type(tree) is tuple and index == 0 and tree and isinstance(tree[0], Tensor):
        rest = tree[1:]
        return tree[0], lambda new: (new, *rest)  # what most layers return, without a flatten
    if index < 0:
        index += count_tensors(tree)
        if index < 0:
            return None
    leaves, spec = tree_flatten(tree)
    for position, leaf in enumerate(leaves):
        held = count_tensors(leaf) if not isinstance(leaf, Tensor) else 1
        if index >= held:
            index -= held
            continue
        found = (leaf, _itself) if isinstance(leaf, Tensor) else _find_in_object(leaf, index)
        if found is None:
            return None
        tensor, put_back = found

        def repack(new: Tensor, at: int = position, inner: Repack = put_back) -> Any:
            return tree_unflatten([*leaves[:at], inner(new), *leaves[at + 1 :]], spec)

        return tensor, repack
    return None


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """All tensors of ``tree`` in the order that ``find_tensor`` counts."""
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, Tensor):
            yield leaf
        else:
            for _, value in _fields(leaf):
                yield from tensors_in(value)


def count_tensors(tree: Any) -> int:
    """How many tensors ``tree`` holds."""
    return sum(1 for _ in tensors_in(tree))


def _itself(new: Tensor) -> Tensor:
    return new


def _fields(leaf: Any) -> list[tuple[str, Any]]:
    """What an object that pytree leaves closed holds: dataclass fields, or a cache's."""
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return [(f.name, getattr(leaf, f.name)) for f in dataclasses.fields(leaf)]
    for names in _CACHES:
        if all(hasattr(leaf, name) for name in names):
            return [(name, getattr(leaf, name)) for name in names]
    return []


def _find_in_object(leaf: Any, index: int) -> tuple[Tensor, Repack] | None:
    for name, value in _fields(leaf):
        held = count_tensors(value)
        if index >= held:
            index -= held
            continue
        found = find_tensor(value, index)
        if found is None:
            return None
        tensor, put_back = found

        def repack(new: Tensor, field: str = name, inner: Repack = put_back) -> Any:
            if dataclasses.is_dataclass(leaf):
                return dataclasses.replace(leaf, **{field: inner(new)})  # type: ignore[type-var]
            setattr(leaf, field, inner(new))
            return leaf

        return tensor, repack
    return None
