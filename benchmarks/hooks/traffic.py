"""Counting the collectives that a piece of code runs, and the bytes that they bring to this rank.

Every collective of torch goes through its dispatcher, in forward and (on CPU, in the same thread)
in backward, so a dispatch mode sees them all, whoever calls them. Activations travel as floats;
what this library's ranks agree on before a forward travels as integers, and is counted apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Traffic", "counted"]

_NAMESPACES = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd"})
_NO_TRAFFIC = frozenset({"barrier", "wait_tensor", "_wrap_tensor_autograd"})


@dataclass
class Traffic:
    """Collectives by name, of activations and of agreement, and the bytes received from others."""

    collectives: Counter[str] = field(default_factory=Counter)
    received: int = 0
    agreements: int = 0
    agreement_received: int = 0

    def add(self, name: str, received: int, *, agreement: bool) -> None:
        if agreement:
            self.agreements += 1
            self.agreement_received += received
        else:
            self.collectives[name] += 1
            self.received += received

    def encoded(self) -> dict[str, Any]:
        return vars(self) | {"collectives": dict(self.collectives)}

    @classmethod
    def decoded(cls, fields: dict[str, Any]) -> Traffic:
        return cls(**fields | {"collectives": Counter(fields["collectives"])})


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what is exchanged while inside."""
    traffic = Traffic()
    with _Counting(traffic), _counting_exchanges(traffic):
        yield traffic


def _counting_exchanges(traffic: Traffic) -> AbstractContextManager[Any]:
    """The exchange before each forward runs on a group that torch's dispatcher does not see."""
    try:
        from flex_model.distributed.control import ControlGroup
    except ImportError:  # 0.1.0 has none
        return nullcontext()
    original = ControlGroup.exchange

    def exchange(group: ControlGroup, own: Sequence[int]) -> Any:
        others = len(group.ranks) - 1
        traffic.add("exchange", others * 8 * len(own), agreement=True)
        return original(group, own)

    return patch.object(ControlGroup, "exchange", exchange)


class _Counting(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace in _NAMESPACES and name not in _NO_TRAFFIC:
            told, count = _COLLECTIVES[name]  # a KeyError tells of one that has no rule yet
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            agreement = not tensors[0].is_floating_point()
            self._traffic.add(told, count(args), agreement=agreement)
        return func(*args, **(kwargs or {}))


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _from_others(own: int) -> int:
    """Every other rank's part, each as large as this rank's."""
    return own * (dist.get_world_size() - 1)


def _reduced(own: int) -> int:
    """A ring's share: the terms of one slice, then the sums of the others."""
    return 2 * _from_others(own) // dist.get_world_size()


def _gathered(args: Any) -> int:
    outputs, inputs = args[:2]
    return _from_others(_bytes(inputs)) if outputs and outputs[0] else 0


_COLLECTIVES: dict[str, tuple[str, Callable[[Any], int]]] = {
    "_allgather_base_": ("all-gather", lambda args: _from_others(_bytes(args[1]))),
    "allgather_": ("all-gather", lambda args: _from_others(_bytes(args[1]))),
    "all_gather_into_tensor": ("all-gather", lambda args: _from_others(_bytes(args[0]))),
    "gather_": ("gather", _gathered),
    "allreduce_": ("all-reduce", lambda args: _reduced(_bytes(args[0]))),
    "all_reduce": ("all-reduce", lambda args: _reduced(_bytes(args[0]))),
    "all_reduce_": ("all-reduce", lambda args: _reduced(_bytes(args[0]))),
}
