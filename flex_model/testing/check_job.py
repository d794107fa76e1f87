"""A whole check, from joining the job to leaving it, with what it prints on the first rank."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch.distributed as dist
from rich.console import Console
from rich.text import Text
from torch.distributed.distributed_c10d import _get_default_store

from flex_model.errors import ConfigurationError
from flex_model.testing.case import Site
from flex_model.testing.check import BuildError, Check, Request
from flex_model.testing.survey import Survey
from flex_model.testing.verdict import State, Verdict, verdict_table

__all__ = ["run_check"]

_COMPARED = (
    "Compared with one process: records, outputs, the gradient at the embedding and those of the "
    "edit's trainable module. Gradients of the model's own weights are left out."
)


def run_check(request: Request, sizes: Mapping[str, int], console: Console) -> int:
    """Check on this job's ranks and print on the first; the exit code, the same on every rank.

    Args:
        request: what is to be checked; its sizes are filled in here.
        sizes: ranks along "pp", "dp", "cp" and "tp", of which 0 stands for all that are left.
        console: where the first rank prints.

    Returns:
        1 if something is wrong or was left unchecked, 2 if what was asked for does not exist.
    """
    # torch says so of every first layer, whose input is a leaf.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    with _joined(request.timeout):
        first = dist.get_rank() == 0
        try:
            request = _with_sizes(request, sizes, dist.get_world_size())
            verdicts = _verdicts(request, console if first else None)
        except ConfigurationError as error:  # the same on every rank
            code = 2
            if first:
                _print_error(console, error)
        except BuildError as error:
            # The others may wait for this rank in whatever they build: as it leaves they see it.
            if _get_default_store().add("flex_model check failed", 1) == 1:
                _print_error(console, error)
            return 2
        else:
            code = int(any(verdict.state.fails for verdict in verdicts))
            if first:
                title = f"{request.source} on {dist.get_world_size()} ranks"
                console.print(verdict_table(title, verdicts))
                console.print(_COMPARED, style="dim")
        dist.barrier()  # whoever watches the ranks ends all of them as the first one leaves
    return code


def _print_error(console: Console, error: Exception) -> None:
    console.print(Text.assemble(("error: ", "red"), str(error)))


def _verdicts(request: Request, console: Console | None) -> list[Verdict]:
    check = Check(request)
    found, case = check.survey()
    sites = _chosen(found, request.hooks)
    verdicts = [check.bare(case)]
    for verdict in check.verdicts(case, sites):
        verdicts.append(verdict)
        if console is not None and console.is_terminal:
            console.print(Text(f"{verdict.site}: {verdict.state.value}", style="dim"))
    asked = request.hooks or found.others
    return verdicts + [
        Verdict(name, State.DEGRADED, notes=(f"no hook point: {found.others[name]}",))
        for name in asked
        if name in found.others
    ]


def _chosen(found: Survey, hooks: tuple[str, ...]) -> list[Site]:
    """The sites of the modules named, or of all.

    Raises:
        ConfigurationError: no such module; the message names the nearest.
    """
    known = [*found.sites, *found.others]
    for name in hooks:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.3))
            raise ConfigurationError(f"The model has no module {name!r}. The nearest are: {near}.")
    names = [name for name in hooks if name in found.sites] if hooks else list(found.sites)
    return [site for name in names for site in found.sites[name]]


def _with_sizes(request: Request, sizes: Mapping[str, int], world: int) -> Request:
    """The request on this many ranks.

    Raises:
        ConfigurationError: sizes that do not fit the ranks, or that need more than a model's call.
    """
    if sizes["pp"] > 1 or sizes["cp"] > 1:
        raise ConfigurationError(
            "check calls the model with whole sequences and takes its logits, for which neither a "
            "stage of a pipeline nor a context-parallel rank can be called. Leave --pp and --cp at "
            "1: what they spread is not checked."
        )
    dp = sizes["dp"]
    tp = sizes["tp"] or max(1, world // dp)
    if tp * dp != world:
        raise ConfigurationError(
            f"tp={tp} x dp={dp} need {tp * dp} ranks, but the job has {world}. Start with "
            f"torchrun --nproc-per-node {tp * dp} --no-python flex-model check ..."
        )
    return replace(request, tp=tp, dp=dp)


@contextmanager
def _joined(timeout: float) -> Iterator[None]:
    """In the group that torchrun's variables tell of; without them, in one of a lone process."""
    limit = timedelta(seconds=timeout)
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=limit)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    try:
        yield
    finally:
        dist.destroy_process_group()
