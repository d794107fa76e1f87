"""The command ``flex-model prune``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import typer
from rich.console import Console
from torch import Tensor

from flex_model.errors import FlexModelError, PruningError
from flex_model.loading.token_files import read_tokens
from flex_model.loading.transformers_model import tokenizer_of
from flex_model.pruning.dimensions import DIMENSIONS
from flex_model.pruning.evaluate import compare
from flex_model.pruning.prune import prune
from flex_model.pruning.save import save
from flex_model.pruning.scores import read_scores
from flex_model.pruning.target import Target, Targets
from flex_model.pruning.text import comparison_table, plan_table
from flex_model.pruning.transformers_model import from_folder

__all__ = ["prune_command"]

_Ratio = Annotated[float | None, typer.Option(help="Share to cut, 0 to 1.")]
_Size = Annotated[int | None, typer.Option(help="Size that is left.")]
# In one forward.
_SEQUENCES = 8
# What a tokenizer is saved as; it goes with the model, unchanged.
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja")


def prune_command(
    model: Annotated[Path, typer.Argument(help="A transformers model's directory.")],
    scores: Annotated[
        Path, typer.Option(help="A safetensors file: one tensor for each module name.")
    ],
    ffn_ratio: _Ratio = None,
    ffn_size: _Size = None,
    kv_heads_ratio: _Ratio = None,
    kv_heads_size: _Size = None,
    hidden_ratio: _Ratio = None,
    hidden_size: _Size = None,
    layers_ratio: _Ratio = None,
    layers_size: _Size = None,
    experts_ratio: _Ratio = None,
    experts_size: _Size = None,
    parameters: Annotated[
        int | None, typer.Option(help="The most that the model may have, by cutting --over.")
    ] = None,
    over: Annotated[
        list[str] | None, typer.Option(help=f"Dimension to cut: {', '.join(DIMENSIONS)}.")
    ] = None,
    multiple_of: Annotated[
        int, typer.Option(help="Round sizes of ratios and of --parameters up to a multiple.")
    ] = 1,
    tokens: Annotated[
        Path | None,
        typer.Option(
            help="Measure perplexity on this text, .npy or .safetensors of token ids (a stream, or "
            "sequences x length)."
        ),
    ] = None,
    sequence: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a sequence, of a text or a stream.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random pruning that is compared with.")] = 0,
    dry_run: Annotated[bool, typer.Option(help="Show what would be cut, change nothing.")] = False,
    to: Annotated[Path | None, typer.Option("--save", help="A new directory.")] = None,
) -> None:
    """Make a model smaller by importance scores, and save it as a plain transformers checkpoint.

    Prints what is cut. Sizes are the same in all layers, for the config has one number for them. A
    KV head goes with its query heads. With --tokens, a table of the perplexity before, after, and
    after cutting as much at random.

    Runs on one process, or on the ranks of torchrun, over which the model is then loaded by its
    tp_plan; what is saved is the same. Exit code 2 if something does not fit.
    """
    if to is None and tokens is None and not dry_run:
        raise typer.BadParameter("give --save, --tokens or --dry-run: else nothing comes of it")
    rank = int(os.environ.get("RANK", "0"))
    try:
        targets = Targets(
            ffn=_target(ffn_ratio, ffn_size, multiple_of),
            kv_heads=_target(kv_heads_ratio, kv_heads_size, multiple_of),
            hidden=_target(hidden_ratio, hidden_size, multiple_of),
            layers=_target(layers_ratio, layers_size, multiple_of),
            experts=_target(experts_ratio, experts_size, multiple_of),
        )
        _add_budget(targets, over or (), parameters, multiple_of)
        with _joined() as ranks:
            _run(
                _Job(model, scores, targets, tokens, sequence, seed, None if dry_run else to),
                rank,
                ranks,
            )
    except FlexModelError as error:
        if rank > 0:  # the first rank tells it
            raise typer.Exit(2) from None
        raise typer.BadParameter(str(error)) from None


@dataclass(frozen=True)
class _Job:
    """What was asked for."""

    model: Path
    scores: Path
    targets: Targets
    tokens: Path | None
    sequence: int | None
    seed: int
    to: Path | None


def _target(ratio: float | None, size: int | None, multiple_of: int) -> Target | None:
    if ratio is None and size is None:
        return None
    return Target(ratio=ratio, size=size, multiple_of=1 if ratio is None else multiple_of)


def _add_budget(
    targets: Targets, over: Sequence[str], parameters: int | None, multiple_of: int
) -> None:
    if (parameters is None) != (not over):
        raise PruningError("--parameters and --over go together: how few, and by cutting what.")
    for name in DIMENSIONS:
        if name in over and targets.get(name) is None:
            targets[name] = Target(parameters=parameters, multiple_of=multiple_of)
        elif name in over:
            raise PruningError(f"--over {name} and --{name.replace('_', '-')}-... exclude another.")
    if unknown := set(over) - set(DIMENSIONS):
        raise PruningError(f"--over takes {', '.join(DIMENSIONS)}, got {', '.join(unknown)}.")


@contextmanager
def _joined() -> Iterator[int]:
    """How many ranks there are: those of torchrun, in one group."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        yield 1
        return
    dist.init_process_group()
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def _run(job: _Job, rank: int, ranks: int) -> None:
    console = Console(quiet=rank > 0)
    if job.to is not None and job.to.exists():
        raise PruningError(f"{job.to} exists already. Give the name of a new directory.")
    scores, batches = read_scores(job.scores), _batches(job)
    model = from_folder(job.model, ranks)
    plan = prune(model, scores, **job.targets, dry_run=True)
    console.print(plan_table(plan))
    if batches:
        found = compare(model, scores, batches, seed=job.seed, **job.targets)
        console.print(comparison_table(found))
    if job.to is not None:
        prune(model, scores, **job.targets)
        save(model, job.to)
        if rank == 0:
            _copy_tokenizer(job.model, job.to)
        console.print(f"saved in {job.to}")


def _batches(job: _Job) -> list[Tensor]:
    """Sequences of token ids, a few at a time."""
    if job.tokens is None:
        return []

    def encode(text: str) -> Sequence[int]:
        ids: list[int] = tokenizer_of(str(job.model))(text)["input_ids"]
        return ids

    return list(read_tokens([job.tokens], job.sequence, encode).ids.split(_SEQUENCES))


def _copy_tokenizer(source: Path, to: Path) -> None:
    for pattern in _TOKENIZER:
        for file in source.glob(pattern):
            shutil.copy(file, to)
