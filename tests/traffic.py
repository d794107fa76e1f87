"""What torch's dispatcher sees of a piece of code on this rank: its collectives, and its memory."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _group_size(args: Any) -> int:
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            try:
                return ProcessGroup.unbox(arg).size()
            except (RuntimeError, TypeError):
                continue
    return 0


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _received(name: str, args: Any) -> int | None:
    """Bytes that this rank receives from others; None for a collective that has no rule here."""
    ranks = _group_size(args)
    if name in ("_allgather_base_", "allgather_"):
        return (ranks - 1) * _bytes(args[1])
    if name == "gather_":
        return (ranks - 1) * _bytes(args[1]) if args[0] and args[0][0] else 0
    if name == "allreduce_":  # a ring's share
        return 2 * (ranks - 1) * _bytes(args[0]) // ranks
    return None


class Counting(TorchDispatchMode):
    """Counts collectives by name and bytes received."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int | None]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self.seen[name, _received(name, args)] += 1
        return func(*args, **(kwargs or {}))


class Memory(TorchDispatchMode):
    """Adds up what was made inside and is still there; ``peak`` is the most at any time."""

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.peak = 0
        self._before = {tensor.untyped_storage()._cdata for tensor in before}
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._before:
                    held = (StorageWeakRef(storage), storage.nbytes())
                    self._held.setdefault(storage._cdata, held)
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return result
