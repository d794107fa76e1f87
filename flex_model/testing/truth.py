"""What runs on the one process: the whole model, under raw torch hooks.

Only the random edits are run under a FlexModel here too, for no raw hook draws the numbers that its
seed stands for.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from flex_model.testing.case import Case, Model, Site
from flex_model.testing.edits import PROBE, Edit
from flex_model.testing.raw_hooks import hook_raw, recorder
from flex_model.testing.runs import RUNS, Run, new_probe_for, step_under_flex_model
from flex_model.testing.step import Outcome, take_step

__all__ = ["bare_on_one_process", "on_one_process"]


def on_one_process(case: Case, site: Site) -> dict[str, Outcome]:
    """Every kind of work at a hook point, by column. A body for one rank."""
    with case.whole() as model:
        return {run.column: _outcome(case, model, site, run) for run in RUNS if run.fits(site)}


def bare_on_one_process(case: Case) -> Outcome:
    """A step with no hook at all. A body for one rank."""
    with case.whole() as model:
        return take_step(case, model, model.module, replicas=1)


def _outcome(case: Case, model: Model, site: Site, run: Run) -> Outcome:
    if run.draws:
        return step_under_flex_model(case, model, site, run, hinted=False, replicas=1)
    probe = new_probe_for(site, run)
    records: list[Tensor] = []
    visit = recorder(records, _applied(run.edit(site.batch_dim), probe) if run.edit else None)
    handle = hook_raw(model.module.get_submodule(site.name), run.kind, site.index, visit)
    try:
        return take_step(case, model, model.module, replicas=1).note_hook(records, probe)
    finally:
        handle.remove()


def _applied(edit: Edit, probe: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda value: edit(None, value, None, {PROBE: probe})
