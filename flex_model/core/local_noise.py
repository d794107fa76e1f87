"""Random draws of a local edit: the whole tensor's, of which each rank takes its slice.

An edit of the whole tensor draws for every entry. One that works on its shard has to see the same
numbers there, so each draw is made at the whole size and cut, which costs arithmetic but no byte.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from flex_model.core.local_shard import LocalShard
from flex_model.errors import EditError

__all__ = ["LocalNoise"]

# How many numbers these take from the stream depends on the values, which each rank has its own of.
_DEPENDENT = frozenset(
    {"multinomial", "poisson", "binomial", "_standard_gamma", "_sample_dirichlet"}
)


class LocalNoise(TorchDispatchMode):
    """While entered, random operations on tensors of the shard's sizes draw at the whole's.

    Args:
        shard: what this rank holds.
        where: hook point and rank, for messages.
    """

    def __init__(self, shard: LocalShard, where: str) -> None:
        super().__init__()
        self._shard = shard
        self._where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self._check(func, args, kwargs)
        whole_args, whole_kwargs = tree_map(self._whole, (args, kwargs), is_leaf=_is_size)
        drawn = func(*whole_args, **whole_kwargs)
        if not func._schema.is_mutable:
            return tree_map(self._part, drawn)
        args[0].copy_(self._part(drawn))
        return args[0]

    def _check(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func.overloadpacket.__name__
        sized = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and self._is_cut(a)]
        if name.rstrip("_") in _DEPENDENT and sized:
            raise EditError(
                f"{self._where}: an editing function that works on its shard draws by {name}, "
                "which takes more or fewer random numbers by the values. Do not declare it local, "
                "so that it gets the whole tensor."
            )

    def _is_cut(self, tensor: Tensor) -> bool:
        return self._whole_sizes(tensor.shape) != tuple(tensor.shape)

    def _whole(self, leaf: Any) -> Any:
        """An argument at the whole's sizes; a tensor with this rank's part in its place."""
        if _is_size(leaf):
            return list(self._whole_sizes(leaf))
        if isinstance(leaf, Tensor) and self._is_cut(leaf):
            return self._shard.embed_aligned(leaf)
        return leaf

    def _part(self, leaf: Any) -> Any:
        return self._shard.take_aligned(leaf) if isinstance(leaf, Tensor) else leaf

    def _whole_sizes(self, sizes: Any) -> tuple[int, ...]:
        """Sizes that broadcast against the shard, as they would be against the whole."""
        found = list(sizes)
        extra = len(self._shard.shape) - len(found)
        for dim in self._shard.dims:
            at = dim - extra
            if at < 0 or found[at] == 1 < self._shard.shape[dim]:
                continue
            if found[at] != self._shard.shape[dim]:
                raise EditError(
                    f"{self._where}: an editing function that works on its shard "
                    f"{tuple(self._shard.shape)} draws random numbers of shape {tuple(sizes)}, of "
                    "which it cannot be told how they belong to the whole "
                    f"{tuple(self._shard.whole_shape)}. Draw at the shard's shape, or do not "
                    "declare the function local."
                )
            found[at] = self._shard.whole_shape[dim]
        return tuple(found)


def _is_size(leaf: Any) -> bool:
    """A list of sizes, as factory functions take it."""
    sized = isinstance(leaf, (list, tuple, torch.Size)) and len(leaf) > 0
    return sized and all(type(item) is int for item in leaf)
