"""Scores in few words: one row for each hook, and families of hooks that belong together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from flex_model.importance.hook import ForwardHook
from flex_model.importance.run.targets import kind_of, module_of

__all__ = ["Family", "Row", "families", "rows"]

_TOP = 0.1


@dataclass(frozen=True)
class Row:
    """One hook's scores.

    Attributes:
        module: the module's name.
        kind: of hook.
        scores: ``[channels]`` (or heads, or one for a layer), float64, in the model's order.
        ranks: whether they are ranks, of which only the order says something.
    """

    module: str
    kind: str
    scores: Tensor
    ranks: bool

    @property
    def layer(self) -> str:
        """The numbers in the module's name: of its layer, and perhaps of more inside it."""
        return ".".join(part for part in self.module.split(".") if part.isdigit())

    @property
    def share(self) -> float | None:
        """What the top tenth of the channels holds of the sum; None where that says nothing."""
        total = float(self.scores.sum())
        if self.ranks or self.scores.numel() == 1 or total <= 0.0:
            return None
        top = self.scores.topk(math.ceil(_TOP * self.scores.numel())).values
        return float(top.sum()) / total


@dataclass(frozen=True)
class Family:
    """Rows of one kind whose modules' names differ in numbers only: the same place in each layer.

    Attributes:
        name: of the modules, numbers as ``*``.
        kind: of hook.
        members: their rows, in the model's order.
    """

    name: str
    kind: str
    members: tuple[Row, ...]


def rows(scores: Mapping[str, Mapping[str, Tensor]], hooks: Mapping[str, ForwardHook]) -> list[Row]:
    """A row for each hook.

    Args:
        scores: what `score` returned.
        hooks: that it was given, by the same keys.
    """
    return [
        Row(
            module_of(key),
            kind_of(hooks[key]),
            named["score"].detach().cpu().double().flatten(),
            not named["score"].is_floating_point(),
        )
        for key, named in scores.items()
    ]


def families(found: list[Row]) -> list[Family]:
    """Rows that belong together, in order of their first."""
    members: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        name = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.module)
        members.setdefault((name, row.kind), []).append(row)
    return [Family(name, kind, tuple(of)) for (name, kind), of in members.items()]
