"""A plan on the terminal: the tree of modules with their layouts, and the table of costs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from flex_model.distributed.cost import Collective
from flex_model.report.layouts import Boundary
from flex_model.report.plan import Cost, Plan, cost_of

__all__ = ["cost_table", "module_tree"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class _Node(NamedTuple):
    """A module as it is shown; two that are shown alike are equal."""

    kind: str
    boundaries: tuple[str, ...]
    children: tuple[tuple[str, _Node], ...]


def module_tree(plan: Plan) -> Tree:
    """Every module with what it takes and returns: this rank's sizes, the whole's, the placements.

    Layers that are alike are shown once.
    """
    names = [name for name, _ in plan.modules]
    children: dict[str, list[str]] = {name: [] for name in names}
    for name in names[1:]:
        children[name.rpartition(".")[0]].append(name)
    kinds = dict(plan.modules)
    texts: dict[str, tuple[str, ...]] = {}
    for boundary in plan.boundaries:
        texts[boundary.module] = (*texts.get(boundary.module, ()), _described(boundary))

    def node(name: str) -> _Node:
        own = ((child.rpartition(".")[2], node(child)) for child in children[name])
        return _Node(kinds[name], texts.get(name, ()), tuple(own))

    return _branch(None, "", node(""))


def cost_table(plan: Plan, hooks: Sequence[str]) -> Table:
    """What hooks cost in each call: bytes received over all ranks, and on one rank at most held.

    Args:
        plan: the plan.
        hooks: module names; none for all, of which those that cost alike are one row.
    """
    table = Table(box=SIMPLE_HEAD, title=_LEGEND, title_justify="left", title_style="dim")
    table.add_column("hook", overflow="fold")
    for heading in ("capture", "edit, forward", "edit, backward", "held: capture", "held: edit"):
        table.add_column(heading, justify="right")
    rows = [(_named(boundary), _cells(boundary)) for boundary in _chosen(plan, hooks)]
    if not hooks:
        rows = [(re.sub(r"(?<=\.)\d+(?=[. ]|$)", "*", name), cells) for name, cells in rows]
    for name, cells in dict.fromkeys(rows):
        table.add_row(Text(name), *(Text(cell) for cell in cells))
    return table


_LEGEND = (
    "Received over all ranks in one call, and held on one rank beside the model's own tensors. "
    "A range: nothing tells before the first backward whether the gradient is whole on each rank."
)


def _chosen(plan: Plan, hooks: Sequence[str]) -> Iterator[Boundary]:
    for boundary in plan.boundaries:
        if boundary.module in hooks or (boundary.module and not hooks):
            yield boundary


def _named(boundary: Boundary) -> str:
    if boundary.kind == "forward_pre":
        return f"{boundary.module} (input)"
    return f"{boundary.module}[{boundary.index}]" if boundary.index else boundary.module


def _cells(boundary: Boundary) -> tuple[str, ...]:
    cost = cost_of(boundary)
    if cost is None:
        return ("not told", "", "", "", "")
    return (
        _received(cost.capture),
        _received(cost.edit),
        _backward(cost),
        _size(cost.capture_peak),
        _size(cost.edit_peak),
    )


def _backward(cost: Cost) -> str:
    least, most = _received(cost.backward), _received(cost.backward_most)
    return least if least == most else f"{least}\nto {most}"


def _received(collectives: Sequence[Collective]) -> str:
    if not collectives:
        return "0"
    kinds = ", ".join(f"{c.groups} {c.kind} over {c.dim}" for c in collectives)
    return f"{_size(sum(c.received for c in collectives))}\n{kinds}"


def _size(number: int) -> str:
    """To three digits."""
    size, unit = float(number), 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.3g} {_UNITS[unit]}"


def _described(boundary: Boundary) -> str:
    side = "in" if boundary.kind == "forward_pre" else "out"
    sizes = "x".join(map(str, boundary.shape))
    if boundary.layout is None:
        return f"{side} {sizes}, not told: {boundary.refused.partition(': ')[2]}"
    whole = "x".join(map(str, boundary.whole))
    return f"{side} {sizes} of {whole}, {boundary.layout.describe()}"


def _branch(tree: Tree | None, name: str, node: _Node) -> Tree:
    label = Text.assemble((f"{name} " if name else "", "bold"), (node.kind, "cyan"))
    for line in node.boundaries:
        label.append(f"\n  {line}", style="default")
    branch = Tree(label) if tree is None else tree.add(label)
    for (child, _), alike in groupby(node.children, key=lambda item: (item[1], item[0].isdigit())):
        names = [name for name, _ in alike]
        shown = [f"{names[0]} to {names[-1]}"] if names[0].isdigit() and names[1:] else names
        for own in shown:
            _branch(branch, own, child)
    return branch
