"""The ways to compare where a model is cut over ranks: hooks on what each rank has a slice of.

Traffic is that of whole steps of the whole model. Time is that of the hooked modules alone: the
model's own collectives, many and of uncertain length, would drown the hooks. What the library does
once per forward, before the first module runs, is timed by itself.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hooks.hooking import Records, edit, hook_raw, wrap
from hooks.llama import sharded, tokens
from hooks.settings import HIDDEN, INNER, TWO_RANKS
from hooks.traffic import Traffic, counted
from timing import Seconds, Way

__all__ = ["Sharded"]

HOOKED = TWO_RANKS.hooked
WHOLE_SHAPE = (None, None, INNER)  # found by this library, needed by 0.1.0
STEPS_TO_STEADY = 2  # the first forward finds the layouts, the first backward may measure


class Sharded:
    """The model cut over all ranks, once for each way to compare, past the first steps."""

    def __init__(self) -> None:
        bare, gathering, retrieving, editing_by_hand, editing = sharded(5)
        self._subjects = {
            "bare": Subject(bare, bare, {}),
            "gather by hand": _hooked_by_hand(gathering, _gather_on_first),
            "retrieve": _hooked_by_library(retrieving, None),
            "edit by hand": _hooked_by_hand(editing_by_hand, _edit_whole),
            "edit": _hooked_by_library(editing, edit),
        }
        for _ in range(STEPS_TO_STEADY):
            self.traffic()

    def ways(self) -> dict[str, Way]:
        """Timing the hooked modules, by way."""
        return {name: subject.time_hooked for name, subject in self._subjects.items()}

    def beginnings(self) -> dict[str, Way]:
        """Timing what comes before the first module, by way."""
        return {name: subject.time_beginning for name, subject in self._subjects.items()}

    def traffic(self) -> dict[str, dict[str, Traffic]]:
        """Of a step, by way and half of the step."""
        return {name: subject.traffic() for name, subject in self._subjects.items()}


class Subject:
    """A model with hooks or without.

    Args:
        model: the model.
        called: what is called in its place: the model, or the library's wrapper.
        records: where the hooks record to.
    """

    def __init__(self, model: nn.Module, called: nn.Module, records: Records) -> None:
        self._called = called
        self._records = records
        self._hooked = [model.get_submodule(name) for name in HOOKED]
        self._first = model.get_submodule("model.embed_tokens")
        self._ids = tokens(TWO_RANKS)
        self._inputs = torch.randn(TWO_RANKS.batch, TWO_RANKS.length, HIDDEN)

    def traffic(self) -> dict[str, Traffic]:
        """What this rank exchanges in the two halves of a step of the whole model."""
        with counted() as forward:
            loss = self._called(input_ids=self._ids, labels=self._ids).loss
        with counted() as backward:
            loss.backward()
        self._records.clear()
        return {"forward": forward, "backward": backward}

    def time_hooked(self) -> Seconds:
        """The hooked modules, one after the other, and their backwards."""
        dist.barrier()
        began = perf_counter()
        outputs = [module(self._inputs) for module in self._hooked]
        seconds = {"forward": perf_counter() - began}
        # 0.1.0's all-gather cuts the graph: behind its edits there is nothing to go back through.
        outputs = [output for output in outputs if output.requires_grad]
        gradients = [torch.ones_like(output) for output in outputs]
        dist.barrier()
        began = perf_counter()
        torch.autograd.backward(outputs, gradients)
        seconds["backward"] = perf_counter() - began
        self._records.clear()
        return seconds

    def time_beginning(self) -> Seconds:
        """From the call of the whole model until its first module is called."""
        reached: list[float] = []
        handle = self._first.register_forward_pre_hook(
            lambda module, args: reached.append(perf_counter())
        )
        dist.barrier()
        began = perf_counter()
        with torch.no_grad():
            self._called(input_ids=self._ids)
        handle.remove()
        self._records.clear()
        return {"beginning": reached[0] - began}


def _hooked_by_hand(model: nn.Module, visit: Any) -> Subject:
    return Subject(model, model, hook_raw(model, HOOKED, visit))


def _hooked_by_library(model: nn.Module, editing_function: Any) -> Subject:
    return Subject(model, *wrap(model, HOOKED, editing_function, WHOLE_SHAPE))


def _gather_on_first(shard: Tensor, records: list[Tensor]) -> None:
    """Retrieval as one writes it: the first rank gets every rank's slice."""
    shard = shard.detach()
    first = dist.get_rank() == 0
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())] if first else None
    dist.gather(shard, parts, dst=0)
    if parts is not None:
        records.append(torch.cat(parts, dim=-1))


def _edit_whole(shard: Tensor, records: list[Tensor]) -> Tensor:
    """An edit as one writes it whose gradients come out right."""
    whole: Tensor = _AllGather.apply(shard)
    if dist.get_rank() == 0:
        records.append(whole.detach().clone())
    return _Slice.apply(edit(None, whole))


def _all_gathered(shard: Tensor) -> Tensor:
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, shard.contiguous())
    return torch.cat(parts, dim=-1)


def _own_slice(whole: Tensor) -> Tensor:
    return whole.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].contiguous()


class _AllGather(torch.autograd.Function):
    """Every rank goes on to compute the same from the whole, so a slice of its gradient is due."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor) -> Tensor:
        return _all_gathered(shard)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _own_slice(gradient)


class _Slice(torch.autograd.Function):
    """Each rank uses its slice alone, so the others' gradients have to be fetched."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor) -> Tensor:
        return _own_slice(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _all_gathered(gradient)
