"""The command ``flex-model``: checks hooks, plans them, scores by them, and prunes models."""

from __future__ import annotations

import difflib
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from flex_model.errors import ConfigurationError
from flex_model.importance.command_line.command import score_command
from flex_model.pruning.command import prune_command
from flex_model.report.plan import Plan
from flex_model.report.plan import plan as planned
from flex_model.report.plan_text import cost_table, module_tree
from flex_model.testing.check import Request
from flex_model.testing.check_job import run_check

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hooks that see whole activations of sharded models, and what is built on them.",
)

_Hooks = Annotated[list[str] | None, typer.Argument(metavar="[HOOK]...", help="Module names.")]
_All = Annotated[bool, typer.Option("--all", help="Every module, in place of HOOKs.")]
_Ranks = Annotated[int, typer.Option(min=1)]


@app.callback()
def _commands() -> None:
    """Commands stay commands, however many there are."""


@app.command()
def check(
    model: Annotated[
        str, typer.Argument(help="A transformers model's directory, or a factory package.module:f.")
    ],
    hooks: _Hooks = None,
    every: _All = False,
    tp: Annotated[
        int | None, typer.Option(min=1, help="Default: all ranks that --dp leaves.")
    ] = None,
    dp: _Ranks = 1,
    pp: _Ranks = 1,
    cp: _Ranks = 1,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of each data-parallel rank.")] = 3,
    sequence: Annotated[int, typer.Option(min=2, help="Tokens of each sequence.")] = 10,
    vocabulary: Annotated[
        int | None, typer.Option(min=2, help="Ids are below it. Default: the smallest embedding's.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Largest relative error that is EXACT.")] = 1e-5,
    timeout: Annotated[float, typer.Option(help="Seconds that any one wait may take.")] = 300.0,
) -> None:
    """Compare hooks on your sharded model with one process: EXACT, DEGRADED or WRONG.

    Runs under torchrun, on the CPU:

        torchrun --nproc-per-node 2 --no-python flex-model check DIR model.layers.0.mlp

    A directory is loaded in float32 by its tp_plan; data-parallel ranks replicate it. A factory is
    YOUR CODE, AND IS EXECUTED: function(whole: bool) returns the module, whole on this process or
    this rank's part of it, with the same weights; it is called once in each process. The module is
    called with token ids, batch x sequence, and returns logits, or an object that has them as
    .logits. It is put into evaluation mode. Ranks lie as (dp, tp), tp fastest.

    Every kind of hook is tried on each HOOK: capture, edits of output and input, one on shards, a
    random one, both backward hooks. Compared are records, outputs, the gradient at the embedding
    and those of the edit's trainable module; not those of the model's own weights.

    EXACT: within the tolerance. DEGRADED: a named refusal, or a kind of hook that torch does not
    offer there. WRONG: another result than one process has. Exit code 1 if anything is WRONG or was
    left UNCHECKED after it, 2 if what you name does not exist, else 0.
    """
    if bool(hooks) == every:
        raise typer.BadParameter("give names of modules, or --all", param_hint="HOOK")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # one process and the ranks are compared on the CPU
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - where a factory's module lies
    request = Request(
        model, 1, 1, tuple(hooks or ()), batch, sequence, vocabulary, tolerance, timeout
    )
    sizes = {"pp": pp, "dp": dp, "cp": cp, "tp": tp or 0}
    raise typer.Exit(run_check(request, sizes, Console()))


class Dtype(str, Enum):
    """Of parameters and activations."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


_DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16, Dtype.fp32: torch.float32}
_MOST_RANKS = 1024


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A transformers config.json, or its directory.")],
    hooks: _Hooks = None,
    every: _All = False,
    tp: _Ranks = 1,
    dp: _Ranks = 1,
    pp: _Ranks = 1,
    cp: _Ranks = 1,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of each data-parallel rank.")] = 2,
    sequence: Annotated[int, typer.Option(min=2, help="Tokens of each sequence.")] = 128,
    dtype: Annotated[Dtype, typer.Option(help="Of parameters and activations.")] = Dtype.bf16,
) -> None:
    """Show layouts, traffic and memory of hooks, from a config alone: no weights, one process.

    Prints the tree of modules with what each takes and returns: this rank's sizes of the whole's,
    and the placement over each mesh dim. Per HOOK (or --all) besides: the collectives of a capture
    and of an edit of the whole tensor, the bytes that all ranks together receive by them, and what
    a rank holds at most beside the model's own tensors. What ranks agree on before a forward, and
    what the first forward and backward compare, comes on top.

    Layouts are those that the model's tp_plan and one forward tell. On real ranks what looks equal
    is compared besides, and may be refused.
    """
    if hooks and every:
        raise typer.BadParameter("give names of modules, or --all", param_hint="HOOK")
    if pp > 1 or cp > 1:
        raise typer.BadParameter(
            "a config tells of no stages and no cut sequences: plan one stage by --tp and --dp",
            param_hint="--pp" if pp > 1 else "--cp",
        )
    if tp * dp > _MOST_RANKS:
        raise typer.BadParameter(f"{tp * dp} ranks are more than {_MOST_RANKS}", param_hint="--dp")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the imagined ranks are of the CPU
    try:
        found = planned(config, {"dp": dp, "tp": tp}, _DTYPES[dtype], batch, sequence)
        _check_names(found, hooks or [])
    except ConfigurationError as error:
        raise typer.BadParameter(str(error), param_hint="CONFIG") from None
    console = Console()
    console.print(module_tree(found))
    if hooks or every:
        console.print(cost_table(found, hooks or []))


app.command("score")(score_command)
app.command("prune")(prune_command)


def _check_names(found: Plan, hooks: list[str]) -> None:
    known = {boundary.module for boundary in found.boundaries}
    for name in hooks:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.3))
            raise ConfigurationError(
                f"A forward calls no module {name!r}. The nearest that it calls are: {near}."
            )
