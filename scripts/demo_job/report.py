"""Compares what the two jobs wrote, and prints it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file

from flex_model.testing import relative_error

__all__ = ["report"]

TOLERANCE = 1e-5  # where ranks add up their terms, the order of a float32 sum differs
Results = dict[str, Any]


def report(console: Console, truth_folder: Path, sharded_folder: Path) -> bool:
    """Prints the comparison; whether the ranks' results are those of the one process."""
    truth, sharded = _read(truth_folder), _read(sharded_folder)
    errors = {
        site: relative_error(sharded["activations"][site], truth["activations"][site])
        for site in truth["local_shapes"]  # in the order of the forward
    }
    probe_error = relative_error(
        torch.tensor(sharded["probe_losses"]), torch.tensor(truth["probe_losses"])
    )
    same_text = sharded["texts"] == truth["texts"]
    console.print(_activations(errors, truth, sharded))
    console.print(_texts(truth, same_text))
    console.print(_probe(truth, sharded, probe_error))
    return same_text and max(probe_error, *errors.values()) <= TOLERANCE


def _read(folder: Path) -> Results:
    results: Results = json.loads((folder / "results.json").read_text())
    return results | {"activations": load_file(folder / "activations.safetensors")}


def _activations(errors: dict[str, float], truth: Results, sharded: Results) -> Table:
    table = _table(
        "Activations captured on 2 ranks, against one process",
        "activation",
        "on rank 0",
        "whole",
        "error",
    )
    for site, error in errors.items():
        whole = truth["activations"][site].shape
        table.add_row(site, _shape(sharded["local_shapes"][site]), _shape(whole), f"{error:.1e}")
    table.caption = "error: the largest difference over the largest value, in float32\n"
    table.caption_justify = "left"
    return table


def _texts(truth: Results, same: bool) -> Table:
    verdict = "the same from both jobs" if same else "DIFFERENT from the two jobs"
    table = _table(f"Generated text, {verdict}", "steering", "text")
    for when, text in truth["texts"].items():
        table.add_row(when, Text(text))
        table.add_section()
    return table


def _probe(truth: Results, sharded: Results, error: float) -> Table:
    table = _table("The probe's loss, in nats", "job", "first", "last", "error")
    for job, results, shown in ("one process", truth, ""), ("2 ranks", sharded, f"{error:.1e}"):
        losses = results["probe_losses"]
        table.add_row(job, f"{losses[0]:.6f}", f"{losses[-1]:.6f}", shown)
    return table


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape))
