"""Pruning on the terminal: what is cut, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from torch import Tensor

from flex_model.pruning.evaluate import Comparison
from flex_model.pruning.plan import Cut, PruningPlan

__all__ = ["comparison_table", "plan_table"]

_SHOWN = 8


def plan_table(plan: PruningPlan) -> Table:
    """What would be cut: a row for each space of indexes, and what becomes of the whole model."""
    table = Table(box=SIMPLE_HEAD, title=_summary(plan), title_justify="left")
    table.add_column("dimension")
    table.add_column("scored as", overflow="fold")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("cut", overflow="fold")
    for cut in plan.cuts:
        before, after = (str(number) for number in (cut.space.size, cut.left))
        table.add_row(cut.space.dimension, Text(cut.space.name), before, after, _dropped(cut))
    return table


def comparison_table(found: Comparison) -> Table:
    """Perplexity before pruning, after it, and after pruning as much at random."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("model")
    table.add_column("parameters", justify="right")
    table.add_column("perplexity", justify="right")
    for row in (found.before, found.after, found.random):
        table.add_row(row.name, f"{row.parameters:,}", f"{row.perplexity:.4g}")
    return table


def _summary(plan: PruningPlan) -> Text:
    before, after = plan.parameters_before, plan.parameters_after
    fields = "".join(f"\nconfig: {name} = {value}" for name, value in plan.fields.items())
    share = 100 * (before - after) / before
    return Text(f"{before:,} parameters, {after:,} are left ({share:.1f} % cut){fields}")


def _dropped(cut: Cut) -> str:
    dropped = cut.dropped
    if dropped.ndim > 1:
        return f"{dropped.shape[-1]} of each expert"
    return _listed(dropped)


def _listed(indexes: Tensor) -> str:
    numbers: Sequence[int] = indexes.tolist()
    told = ", ".join(map(str, numbers[:_SHOWN]))
    more = len(numbers) - _SHOWN
    return f"{told} and {more} more" if more > 0 else told
