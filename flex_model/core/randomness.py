"""One random stream per hook call, the same on every rank and apart from the model's own.

An edit draws from torch's default generators as any code does. Around it they are seeded from
(the FlexModel's seed, hook, step, call), and afterwards put back as they were. So the ranks of a
replica draw alike whatever their own seeds, calls differ from each other, and the model's dropout
never notices. Setting a generator aside costs about two microseconds.

Activation checkpointing runs the forward again inside backward and must meet the same noise. The
recomputed activation is the same to the bit, so it is recognised by a few of its values.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flex_model.errors import RecomputeError

__all__ = ["RandomStreams", "in_backward"]

_REMEMBERED_CALLS = 4096
_PROBES = 16
_SEED_BITS = 2**63 - 1


def in_backward() -> bool:
    """Whether autograd is running: a forward inside it is a recompute."""
    return torch._C._current_graph_task_id() != -1


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
        self._drawn: OrderedDict[tuple[Any, ...], int] = OrderedDict()

    def run(self, edit: Callable[[], Any], local: Tensor, order: int) -> Any:
        """Call an edit on its own stream.

        Args:
            edit: what to call.
            local: this rank's activation before the edit; tells a recompute which call it repeats.
            order: place of the editing function in the hook point's chain.

        Raises:
            RecomputeError: a recompute draws random numbers but repeats no call that did.
        """
        key = self._recalled(local, order) if in_backward() else self._next(order)
        generators = _generators(local.device)
        before = [generator.get_state() for generator in generators]
        seed = (self._root + (key or 0)) & _SEED_BITS
        for generator in generators:
            generator.manual_seed(seed)
        seeded = [generator.get_state() for generator in generators]
        try:
            result = edit()
            for generator, state in zip(generators, seeded, strict=True):
                if not torch.equal(generator.get_state(), state):
                    self._note_drawn(local, order, key)
                    break
            return result
        finally:
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)

    def _next(self, order: int) -> int:
        self._calls += 1
        return _mixed(self._calls, order)

    def _note_drawn(self, local: Tensor, order: int, key: int | None) -> None:
        if key is None:
            raise RecomputeError(
                f"{self._where}: a recompute in backward draws random numbers, but its activation "
                f"of shape {tuple(local.shape)} is none that the forward saw, so the noise cannot "
                "be the same. Make the recomputed region deterministic (preserve_rng_state=True)."
            )
        if not in_backward():
            self._drawn[(order, *_fingerprint(local))] = key
            while len(self._drawn) > _REMEMBERED_CALLS:
                self._drawn.popitem(last=False)

    def _recalled(self, local: Tensor, order: int) -> int | None:
        return self._drawn.get((order, *_fingerprint(local)))


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
    flat = local.detach().reshape(-1)
    probes = flat[:: max(1, flat.numel() // _PROBES)]
    return (*local.shape, *probes.tolist())
