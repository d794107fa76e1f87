"""One random stream per hook call, the same on every rank and apart from the model's own.

An edit draws from torch's default generators as any code does. Around it they are seeded from
(the FlexModel's seed, hook, step, call), and afterwards put back as they were. So the ranks of a
replica draw alike whatever their own seeds, calls differ from each other, and the model's dropout
never notices. Setting a generator aside costs about two microseconds.

Activation checkpointing runs the forward again inside backward and must meet the same noise. The
recomputed activation is the same to the bit, so it is recognised by its content; of calls that saw
the same content, autograd's sequence numbers tell which one is repeated.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flex_model.core.transforms import plain_values
from flex_model.errors import RecomputeError

__all__ = ["RandomStreams", "in_backward", "repeated"]

_REMEMBERED_CALLS = 4096
_SEED_BITS = 2**63 - 1


def in_backward() -> bool:
    """Whether autograd is running: a forward inside it is a recompute."""
    return torch._C._current_graph_task_id() != -1


@dataclass(frozen=True)
class _Call:
    """A call that drew random numbers.

    Attributes:
        key: what its stream was seeded with.
        sequence: autograd's count of nodes when it ran.
        recorded: whether autograd recorded it (reentrant checkpointing runs it unrecorded).
    """

    key: int
    sequence: int
    recorded: bool


class RandomStreams:
    """The random streams of one hook point.

    Args:
        seed: the FlexModel's seed.
        where: module and hook kind; distinguishes hook points and names them in messages.
    """

    def __init__(self, seed: int, where: str) -> None:
        self._where = where
        self._root = int.from_bytes(hashlib.blake2b(f"{seed}:{where}".encode()).digest()[:8], "big")
        self._calls = 0
        self._drawn: OrderedDict[tuple[Any, ...], list[_Call]] = OrderedDict()

    def run(
        self,
        edit: Callable[[], Any],
        local: Tensor,
        order: int,
        *,
        remember: bool = False,
        recompute: bool = False,
    ) -> Any:
        """Call an edit on its own stream.

        Args:
            edit: what to call.
            local: this rank's activation before the edit; tells a recompute which call it repeats.
            order: place of the editing function in the hook point's chain.
            remember: whether a recompute may come, so that it matters which calls drew.
            recompute: whether this call is one: a forward, run again within backward.

        Raises:
            RecomputeError: a recompute draws random numbers but repeats no call that did.
        """
        key = self._recalled(local, order) if recompute else self._next(order)
        generators = _generators(local.device)
        before = [generator.get_state() for generator in generators]
        seed = (self._root + (key or 0)) & _SEED_BITS
        for generator in generators:
            generator.manual_seed(seed)
        watch = remember or recompute
        seeded = [generator.get_state() for generator in generators] if watch else []
        try:
            result = edit()
            for generator, state in zip(generators, seeded, strict=False):
                if not torch.equal(generator.get_state(), state):
                    self._note_drawn(local, order, key, recompute)
                    break
            return result
        finally:
            _restore(generators, before)

    def _next(self, order: int) -> int:
        self._calls += 1
        return _mixed(self._calls, order)

    def _note_drawn(self, local: Tensor, order: int, key: int | None, recompute: bool) -> None:
        if key is None:
            raise RecomputeError(
                f"{self._where}: a recompute in backward draws random numbers, but its activation "
                f"of shape {tuple(local.shape)} is none that the forward saw, so the noise cannot "
                "be the same. Make the recomputed region deterministic (preserve_rng_state=True)."
            )
        if recompute:
            return
        call = _Call(key, torch.autograd._get_sequence_nr(), torch.is_grad_enabled())
        self._drawn.setdefault((order, *_fingerprint(local)), []).append(call)
        while len(self._drawn) > _REMEMBERED_CALLS:
            self._drawn.popitem(last=False)

    def _recalled(self, local: Tensor, order: int) -> int | None:
        """The stream of the call that a recompute repeats."""
        calls = self._drawn.get((order, *_fingerprint(local)))
        if not calls:
            return None
        node = torch._C._current_autograd_node()._sequence_nr()
        if not calls[-1].recorded:
            # The checkpoint's own node was made just before the call.
            return min(calls, key=lambda call: abs(call.sequence - node)).key
        # The node that wants its tensors back was made in the same region, mostly after the call.
        earlier = [call for call in calls if call.sequence <= node]
        return (earlier[-1] if earlier else calls[0]).key


@contextmanager
def repeated(device: torch.device) -> Iterator[Callable[[], None]]:
    """What is yielded sets the generators back to where they stood, to draw the same once more.

    Behind it they stand where the first drawing left them.
    """
    generators = _generators(device)
    before = [generator.get_state() for generator in generators]
    after: list[Tensor] = []

    def again() -> None:
        after.extend(generator.get_state() for generator in generators)
        _restore(generators, before)

    yield again
    _restore(generators, after)


def _restore(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=False):
        generator.set_state(state)


def _mixed(calls: int, order: int) -> int:
    # Odd multipliers keep neighbouring calls and chain places apart in 64 bits.
    return (calls * 0x9E3779B97F4A7C15 + order * 0xC2B2AE3D27D4EB4F) & (2**64 - 1)


def _generators(device: torch.device) -> list[torch.Generator]:
    """The generators an edit may draw from: the CPU's and the activation's device's."""
    generators = [torch.default_generator]
    if device.type not in ("cpu", "meta"):
        module = torch.get_device_module(device)
        index = device.index if device.index is not None else module.current_device()
        generators.append(module.default_generators[index])
    return generators


def _fingerprint(local: Tensor) -> tuple[Any, ...]:
    """What tells one activation from another: a change of any entry changes a sum."""
    flat = plain_values(local.detach()).reshape(-1).to(torch.float64)
    ramp = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device)
    return (*local.shape, *torch.stack((flat.sum(), flat @ ramp)).tolist())
