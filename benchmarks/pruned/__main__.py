"""`scripts/bench pruned`: perplexity after FFN channels are cut by every kind of score."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from byte_llama import byte_llama, text_bytes
from flex_model import FlexModel
from flex_model.importance import (
    ForwardHook,
    IndependentChannelContributionHook,
    IterativeChannelContributionHook,
    L2NormHook,
)
from flex_model.pruning import Target, perplexity, prune, pruned, random_scores

RATIOS = (0.25, 0.5)
SEEDS = range(5)
BATCHES, SEQUENCES, WINDOW = 16, 8, 256  # of calibration
Scores = dict[str, Tensor]


def main() -> None:
    """Scores on the training text, and measures on the validation text."""
    logging.disable_progress_bar()
    torch.set_num_threads(2)
    console = Console()
    model = AutoModelForCausalLM.from_pretrained(byte_llama()).eval()
    train, validation = text_bytes()
    calibration = _windows(train)[: BATCHES * SEQUENCES].split(SEQUENCES)
    batches = _windows(validation).split(SEQUENCES)
    scores = _scores(model, calibration)
    table = Table("channels cut by", *(f"{ratio:.0%} cut" for ratio in RATIOS),
                  title=f"Perplexity per byte; {perplexity(model, batches):.3f} uncut")  # fmt: skip
    for name, found in scores.items():
        table.add_row(name, *(f"{_after(model, found, r, batches):.3f}" for r in RATIOS))
    table.add_row(f"random, {len(SEEDS)} seeds", *(_at_random(model, r, batches) for r in RATIOS))
    console.print(
        f"Byte-level Llama, {sum(p.numel() for p in model.parameters()):,} parameters, 512 FFN "
        f"channels in each of 4 layers; scored on {BATCHES} batches of {SEQUENCES} x {WINDOW} bytes"
    )
    console.print(table)


def _windows(text: Tensor) -> Tensor:
    return text[: len(text) // WINDOW * WINDOW].view(-1, WINDOW)


def _scores(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, Scores]:
    """By kind; all kinds in one pass."""
    layers = {n: m for n, m in model.named_modules() if n.endswith("mlp.down_proj")}
    makers: dict[str, Callable[[nn.Module], ForwardHook]] = {
        "IndependentChannelContributionHook": IndependentChannelContributionHook,
        "IterativeChannelContributionHook": lambda layer: IterativeChannelContributionHook(
            layer, {"validation_full_iters": len(batches)}
        ),
        "the same, scale_by_magnitude": lambda layer: IterativeChannelContributionHook(
            layer,
            {"validation_full_iters": len(batches), "calibration_method": "scale_by_magnitude"},
        ),
        "L2NormHook": lambda layer: L2NormHook(sequence_dim=1),
    }
    hooks = {
        kind: {name: make(layer) for name, layer in layers.items()} for kind, make in makers.items()
    }
    with FlexModel(model, {}) as hooked, torch.no_grad():
        for of_kind in hooks.values():
            for name, hook in of_kind.items():
                hooked.register_importance_hook(name, hook)
        for batch in batches:
            hooked(input_ids=batch, use_cache=False)
    found = {
        kind: {name: hook.accumulate() for name, hook in of_kind.items()}
        for kind, of_kind in hooks.items()
    }
    found["weight norm alone"] = {
        name: layer.weight.detach().norm(dim=0) for name, layer in layers.items()
    }
    return found


def _after(model: nn.Module, scores: Scores, ratio: float, batches: Sequence[Tensor]) -> float:
    plan = prune(model, scores, ffn=Target(ratio=ratio), dry_run=True)
    with pruned(model, plan):
        return perplexity(model, batches)


def _at_random(model: nn.Module, ratio: float, batches: Sequence[Tensor]) -> str:
    found = [_after(model, random_scores(model, seed), ratio, batches) for seed in SEEDS]
    return f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"


if __name__ == "__main__":
    main()
