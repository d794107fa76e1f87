"""The kinds of work that the parity grid compares, and the columns their numbers count for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor, nn

from flex_model import FlexModel, HookFunction
from flex_model.testing.case import Case, Model, Site
from flex_model.testing.edits import PROBE, Edit, local_edit, mixing_edit, new_probe, random_edit
from flex_model.testing.step import Outcome, take_step

__all__ = ["COLUMNS", "RUNS", "Run", "new_probe_for", "step_under_flex_model"]

_SEED = 5


@dataclass(frozen=True)
class Run:
    """One kind of hook on one hook point.

    Attributes:
        column: where what is measured counts, but for what ``apart`` names.
        kind: the kind of hook, as in ``register_<kind>_hook``.
        edit: makes the editing function from the dim to roll along; None retrieves only.
        apart: quantities with a column of their own.
    """

    column: str
    kind: str
    edit: Callable[[int], Edit] | None = mixing_edit
    apart: Mapping[str, str] = field(default_factory=dict)

    @property
    def side(self) -> str:
        """Which side of the module the hook sees."""
        return "input" if self.kind in ("forward_pre", "full_backward") else "output"

    @property
    def draws(self) -> bool:
        """Whether the edit is a random one."""
        return self.edit is random_edit

    @property
    def on_shards(self) -> bool:
        """Whether the edit runs on the ranks' shards."""
        return self.edit is local_edit

    def fits(self, site: Site) -> bool:
        """Whether torch itself offers this hook at the site."""
        if self.kind.startswith("full_backward") and not site.backward:
            return False
        if self.kind == "full_backward" and site.keywords_only:
            return False
        return self.side == "output" or (site.input_width is not None and site.index == 0)


_APART = {name: name for name in ("input grad", "weight grad", "trainable grad")}

RUNS = (
    Run("capture", "forward", None),
    Run("edit", "forward", apart=_APART),
    Run("pre-hook edit", "forward_pre"),
    Run("local edit", "forward", local_edit),
    Run("backward hook", "full_backward"),
    Run("backward-pre hook", "full_backward_pre"),
    Run("random edit", "forward", random_edit),
)

COLUMNS = (*(run.column for run in RUNS[:-1]), *_APART, RUNS[-1].column)


def step_under_flex_model(
    case: Case, model: Model, site: Site, run: Run, *, hinted: bool, replicas: int
) -> Outcome:
    """A step with one hook on it, on as many ranks as the model is built for."""
    records: dict[str, list[Tensor]] = {}
    probe = new_probe_for(site, run)
    hook = HookFunction(
        site.name,
        expected_shape=site.hint(run.side) if hinted else None,
        editing_function=run.edit(site.batch_dim) if run.edit else None,
        unpack_idx=site.index,
        record=True,  # an edit on shards records only if asked to
    )
    hooked = FlexModel(
        model.module,
        records,
        tensor_parallel_size=dist.get_world_size() // (model.stages * replicas * model.cp),
        pipeline_parallel_size=model.stages,
        data_parallel_size=replicas,
        context_parallel_size=model.cp,
        seed=_SEED,
    )
    with hooked:
        hooked.register_trainable_module(PROBE, probe)
        getattr(hooked, f"register_{run.kind}_hook")(hook)
        if model.parallelize is not None:
            model.parallelize()
        around = hooked.step() if model.schedule is not None else nullcontext()
        outcome = take_step(case, model, hooked, replicas, around)
    return outcome.note_hook(records.get(site.name, []), probe)


def new_probe_for(site: Site, run: Run) -> nn.Module:
    """The edit's trainable module; only the first rank's values are right, to be handed out."""
    width = site.input_width if run.side == "input" else site.width
    return new_probe(width or site.width, seed=21 + dist.get_rank())
