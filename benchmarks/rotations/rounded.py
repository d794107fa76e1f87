"""Perplexity of the byte-level Llama with weights (and activations) rounded, rotated or not."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from byte_llama import byte_llama, text_bytes
from flex_model.compress.spinquant import Rotations, learn, rotate
from flex_model.pruning import perplexity
from rounding import quantized

__all__ = ["BITS", "measured"]

BITS: tuple[tuple[int, int | None], ...] = ((4, None), (3, None), (4, 4))
SEEDS = range(5)
WINDOW, BATCH = 256, 16
ALL: dict[str, Any] = {"rotations": ("R1", "R2", "R4")}
WAYS: dict[str, dict[str, Any]] = {
    "R1": {"rotations": ("R1",)},
    "R1 R2": {"rotations": ("R1", "R2")},
    "R1 R2 R4": ALL,
}


def measured() -> tuple[float, dict[str, list[str]]]:
    """Perplexity unrounded, and by way that of each of `BITS`."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(byte_llama()).eval()
    train, validation = text_bytes()
    batches = _windows(validation).split(BATCH)
    found = {"not rotated": [f"{value:.3f}" for value in _rounded(model, batches)]}
    for name, how in WAYS.items():
        found[f"{name}, hadamard"] = _after(model, batches, [how])
        signed = {**how, "transform_type": "random-hadamard"}
        found[f"{name}, random-hadamard"] = _after(
            model, batches, [{**signed, "seed": seed} for seed in SEEDS]
        )
    order = torch.randperm(len(train) // WINDOW, generator=torch.Generator().manual_seed(0))
    calibration = _windows(train)[order[:64]].split(4)
    seeds = [{**ALL, "transform_type": "random-hadamard", "seed": seed} for seed in SEEDS]
    found["R1 R2 R4, random-hadamard, learned"] = _after(
        model, batches, seeds, lambda rotations: learn(rotations, calibration, steps=60,
                                                       learning_rate=1e-3)
    )  # fmt: skip
    return perplexity(model, batches), found


def _after(
    model: Any,
    batches: Sequence[Tensor],
    hows: Sequence[dict[str, Any]],
    further: Callable[[Rotations], object] = lambda rotations: None,
) -> list[str]:
    rows = []
    for how in hows:
        rotations = rotate(model, **how)
        further(rotations)
        rows.append(_rounded(model, batches))
        rotations.undo()
    return [_spelled(column) for column in zip(*rows, strict=True)]


def _spelled(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _rounded(model: Any, batches: Sequence[Tensor]) -> list[float]:
    found = []
    for weights, activations in BITS:
        with quantized(model, weights, activations):
            found.append(perplexity(model, batches))
    return found


def _windows(text: Tensor) -> Tensor:
    return text[: len(text) // WINDOW * WINDOW].view(-1, WINDOW)
