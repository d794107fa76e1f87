"""The parity grid: every kind of hook on every hook point, on one process and on N ranks, compared.

A row is a `flex_model.testing.case.Case`. One process runs its whole model under raw torch
hooks; N ranks run its sharded model under a FlexModel, once with an ``expected_shape`` and once
without.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from flex_model.testing.case import Case, Site
from flex_model.testing.compare import Measurement
from flex_model.testing.ranks import RankFailure, run_ranks
from flex_model.testing.runs import COLUMNS
from flex_model.testing.sharded import bare_on_a_rank, on_a_rank
from flex_model.testing.truth import bare_on_one_process, on_one_process

__all__ = ["measure_bare", "measure_row", "measure_site"]


def measure_row(
    case: Case,
    on_site: Callable[[Site], None] = lambda site: None,
    timeout: float = 120.0,
    hinted: Callable[[Site], bool] = lambda site: True,
) -> list[Measurement]:
    """A row of the grid: every hook point of the case.

    Args:
        case: the row.
        on_site: called as each hook point is done, to show progress.
        timeout: seconds that one hook point may take.
        hinted: whether a hook point is measured with a hint too.
    """
    measured = []
    for site in case.sites:
        try:
            measured += measure_site(case, site, timeout, hinted=hinted(site))
        except RankFailure as failure:  # not one number came back, so none passes
            notes = [str(failure), *["as the first"] * (len(COLUMNS) - 1)]
            measured += [_lost(*item, site) for item in zip(COLUMNS, notes, strict=True)]
        on_site(site)
    return measured


def measure_site(
    case: Case, site: Site, timeout: float = 120.0, *, hinted: bool = True
) -> list[Measurement]:
    """Every column at one hook point, without a hint and with one: of each number, the worst
    rank's.

    Raises:
        RankFailure: a rank raised what is no `flex_model.errors.FlexModelError`, or hung.
    """
    truth = run_ranks(on_one_process, 1, case, site, timeout=timeout)[0]
    worst: dict[tuple[object, ...], Measurement] = {}
    work = (on_a_rank, case.world_size, case, site, truth, hinted)
    for measured in run_ranks(*work, timeout=timeout):
        for m in measured:
            key = (m.column, m.hint, m.quantity)
            worst[key] = max(worst.get(key, m), m, key=lambda measurement: measurement.error)
    return list(worst.values())


def measure_bare(case: Case, timeout: float = 60.0) -> dict[str, float]:
    """The models themselves, no hook on them: that both compute the same, by quantity."""
    truth = run_ranks(bare_on_one_process, 1, case, timeout=timeout)[0]
    by_rank = run_ranks(bare_on_a_rank, case.world_size, case, truth, timeout=timeout)
    return {quantity: max(errors[quantity] for errors in by_rank) for quantity in by_rank[0]}


def _lost(column: str, note: str, site: Site) -> Measurement:
    return Measurement(column, str(site), False, "rank failure", math.inf, 0.0, site.hard, note)
