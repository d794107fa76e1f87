"""What runs on each of N ranks: its part of the model, under a FlexModel, against the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import product

import torch
import torch.distributed as dist

from flex_model.errors import FlexModelError
from flex_model.testing.case import Case, Model, Site
from flex_model.testing.compare import Measurement
from flex_model.testing.runs import RUNS, Run, step_under_flex_model
from flex_model.testing.step import Outcome, differences, take_step

__all__ = ["bare_on_a_rank", "measured", "on_a_rank"]


def on_a_rank(
    case: Case, site: Site, truth: Mapping[str, Outcome], hinted: bool = True
) -> list[Measurement]:
    """Every kind of work at a hook point, without a hint and with one. A body for the case's
    ranks.
    """
    found = []
    with _Builder(case) as builder:
        for run, hint in product(RUNS, (False, True) if hinted else (False,)):
            if run.fits(site):
                found += measured(case, builder.model(), site, run, hint, truth[run.column])
    return found


def measured(
    case: Case, model: Model, site: Site, run: Run, hinted: bool, truth: Outcome
) -> list[Measurement]:
    """One kind of work at a hook point; a named refusal is one measurement, ``raised``."""
    return [
        Measurement(
            column=run.apart.get(quantity, run.column),
            site=str(site),
            hint=hinted,
            quantity=quantity,
            error=error,
            tolerance=case.tolerance(quantity, on_shards=run.on_shards),
            hard=site.hard,
            note=note,
        )
        for quantity, (error, note) in _found(case, model, site, run, hinted, truth).items()
    ]


def bare_on_a_rank(case: Case, truth: Outcome) -> dict[str, float]:
    """Relative errors of a step with no hook at all, by quantity. A body for the case's ranks."""
    with case.sharded() as model:
        if model.parallelize is not None:
            model.parallelize()
        actual = take_step(case, model, model.module, case.dp)
        found = differences(case, model, actual, truth)
    return {quantity: error for quantity, (error, _) in found.items()}


class _Builder(ExitStack):
    """Builds the sharded model: once, or anew for each run where it is hooked before sharding."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self._case = case
        self._model: Model | None = None

    def model(self) -> Model:
        if self._model is None or self._model.parallelize is not None:
            self.close()
            self._model = self.enter_context(self._case.sharded())
        return self._model


def _found(
    case: Case, model: Model, site: Site, run: Run, hinted: bool, truth: Outcome
) -> dict[str, tuple[float, str]]:
    try:
        with _own_random_stream(1000 + dist.get_rank()) as drawn_from:
            actual = step_under_flex_model(case, model, site, run, hinted=hinted, replicas=case.dp)
    except FlexModelError as error:  # raised by every rank alike, so they are in step for the next
        return {"raised": (math.inf, f"{type(error).__name__}: {error}")}
    found = differences(case, model, actual, truth)
    found["random stream"] = (math.inf if drawn_from() else 0.0, "")
    return found


@contextmanager
def _own_random_stream(seed: int) -> Iterator[Callable[[], bool]]:
    """Seed this rank's own stream; what is yielded tells whether anyone has drawn from it since."""
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    yield lambda: not torch.equal(before, torch.get_rng_state())
