"""The ways to compare on one process: each a forward without gradients, then a step with them."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor, nn

from hooks.hooking import Records, edit, hook_raw, wrap
from hooks.llama import sharing_weights, tokens, whole
from hooks.settings import ONE_PROCESS
from timing import Seconds, Way

__all__ = ["ways"]

HOOKED = ONE_PROCESS.hooked


def ways() -> dict[str, Way]:
    """Each way on modules of its own around the same weights; the idle wrapper on the bare ones."""
    bare = whole()

    def raw(visit: Callable[[Tensor, list[Tensor]], Tensor | None]) -> Way:
        model = sharing_weights(bare)
        return _way(model, hook_raw(model, HOOKED, visit))

    return {
        "bare": _way(bare, {}),
        "idle": _way(*wrap(bare, ())),
        "raw retrieve": raw(_retrieve),
        "retrieve": _way(*wrap(sharing_weights(bare), HOOKED)),
        "raw edit": raw(_retrieve_and_edit),
        "edit": _way(*wrap(sharing_weights(bare), HOOKED, edit)),
    }


def _retrieve(output: Tensor, records: list[Tensor]) -> None:
    records.append(output.detach().clone())


def _retrieve_and_edit(output: Tensor, records: list[Tensor]) -> Tensor:
    """What the library does: the record of the value before, and an edit free to work in place."""
    records.append(output.detach().clone())
    return edit(None, output.clone())


def _way(model: nn.Module, records: Records) -> Way:
    ids = tokens(ONE_PROCESS)

    def run() -> Seconds:
        with torch.no_grad():
            began = perf_counter()
            model(input_ids=ids)
            ended = perf_counter()
        records.clear()
        seconds = {"forward": ended - began}
        began = perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        seconds["step"] = perf_counter() - began
        records.clear()
        return seconds

    return run
