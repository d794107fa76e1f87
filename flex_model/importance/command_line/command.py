"""The command ``flex-model score``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flex_model.importance.command_line.job import Request, run_score

__all__ = ["score_command"]


def score_command(
    model: Annotated[Path, typer.Argument(help="A transformers model's directory.")],
    config: Annotated[Path, typer.Option(help="What is scored, and by which batches: YAML.")],
    out: Annotated[Path, typer.Option(help="Folder that the results are written to.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder that the run's state is kept in, to resume from.")
    ] = None,
    every: Annotated[
        str, typer.Option(help="From one checkpoint to the next: batches (10) or time (90s, 10m).")
    ] = "10m",
    tp: Annotated[
        int | None, typer.Option(min=1, help="Default: all ranks that --dp leaves.")
    ] = None,
    dp: Annotated[int, typer.Option(min=1, help="Ranks with a part of the batch each.")] = 1,
) -> None:
    """Score channels, heads and layers of a model, whole or under torchrun.

        torchrun --nproc-per-node 2 --no-python flex-model score DIR --config score.yaml --out OUT

    The config names modules by pattern and the kinds of hooks on them, all scored in one pass:

        targets:
          - {pattern: model.layers.*.mlp.down_proj, kind: iterative}
          - {pattern: model.layers.*.self_attn.o_proj, kind: kv_heads}
        batches: {files: [text.txt], batch: 8, sequence: 512, limit: 64}
        dtype: bfloat16

    With --checkpoint, the same command started again goes on where the last one ended, be it that
    it was killed, and finds the same scores to the bit.

    Writes each rank's scores (rank_*.safetensors, args.json), scores.safetensors for pruning,
    scores.png and scores.html. Exit code 2 if something is refused by name, else 0.
    """
    request = Request(
        model=str(model),
        config=str(config),
        out=str(out),
        checkpoint=str(checkpoint) if checkpoint is not None else None,
        every=every,
        tp=tp or 0,
        dp=dp,
    )
    raise typer.Exit(run_score(request, Console()))
