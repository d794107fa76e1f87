"""What is kept of a model: decided as a whole, and proved to work, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flex_model.errors import PruningError
from flex_model.pruning.configuration import (
    changed_fields,
    check_weights,
    pruned_config,
    skeleton,
)
from flex_model.pruning.dimensions import DIMENSIONS, Dimension, Dimensions, Space, read
from flex_model.pruning.scores import Scores, check_names, scores_of
from flex_model.pruning.sharded import check_even, check_spread
from flex_model.pruning.target import Target, Targets, sizes_for

__all__ = ["Cut", "PruningPlan", "make_plan"]


@dataclass(frozen=True, eq=False)
class Cut:
    """What is kept of one space of indexes.

    Attributes:
        space: which one.
        kept: the indexes that stay, ascending: ``[left]``, or ``[experts left, left]`` where each
            expert keeps its own; int64, on the CPU.
    """

    space: Space
    kept: Tensor

    @property
    def left(self) -> int:
        """How many stay."""
        return self.kept.shape[-1]

    @property
    def dropped(self) -> Tensor:
        """The indexes that go, ascending; of the shape of ``kept`` but for the last dim."""
        rows = self.kept.reshape(-1, self.left)
        goes = torch.ones(len(rows), self.space.size, dtype=torch.bool).scatter_(
            1, rows, value=False
        )
        return goes.nonzero()[:, 1].view(*self.kept.shape[:-1], -1)


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """What pruning does to a model.

    Attributes:
        cuts: what is kept of each space that loses something, in the model's order.
        fields: the config's fields that change, with their new values.
        parameters_before: of the whole model.
        parameters_after: of the whole model.
    """

    cuts: tuple[Cut, ...]
    fields: Mapping[str, Any]
    parameters_before: int
    parameters_after: int

    @property
    def kept(self) -> dict[str, Tensor]:
        """The indexes that stay, by the space's name."""
        return {cut.space.name: cut.kept for cut in self.cuts}


def make_plan(model: nn.Module, scores: Scores, targets: Targets) -> PruningPlan:
    """Choose what is kept, and check that a working model comes of it. Changes nothing.

    Args:
        model: a transformers decoder model, whole or as its ``tp_plan`` shards it.
        scores: by module name; those of dimensions without a target are not looked at.
        targets: by dimension.

    Raises:
        PruningError: the architecture, the scores or the targets do not fit.
    """
    dimensions = read(model)
    check_spread(model)
    check_names(model, dimensions, scores)
    given = _given(targets)
    config: Any = model.config
    order = _layer_order(dimensions, scores, given)
    sizes = sizes_for(
        dimensions, given, _smallest(config, dimensions), partial(_parameters, dimensions, order)
    )
    layers = _layers_left(dimensions, order, sizes)
    fields = changed_fields(config, sizes, layers)
    check_weights(skeleton(model, pruned_config(config, fields)), dimensions, sizes, layers)
    check_even(model, dimensions, sizes)
    return PruningPlan(
        cuts=_cuts(dimensions, scores, sizes, layers),
        fields=fields,
        parameters_before=dimensions.parameters({}, range(dimensions.spaces["layers"].size)),
        parameters_after=dimensions.parameters(sizes, layers),
    )


def _given(targets: Targets) -> dict[Dimension, Target]:
    given: dict[Dimension, Target] = {}
    for name in DIMENSIONS:
        target = targets.get(name)
        if isinstance(target, Target):
            given[name] = target
        elif target is not None:
            raise PruningError(
                f"{name} takes a Target, such as Target(ratio=0.25), got {target!r}."
            )
    if not given:
        raise PruningError("Nothing to prune: give a target for at least one dimension.")
    return given


def _layer_order(
    dimensions: Dimensions, scores: Scores, targets: Mapping[Dimension, Target]
) -> list[int]:
    """The layers, the most important first."""
    space = dimensions.spaces["layers"]
    if "layers" not in targets:
        return list(range(space.size))
    return _ranking(scores_of(space, scores)).tolist()


def _layers_left(
    dimensions: Dimensions, order: Sequence[int], sizes: Mapping[str, int]
) -> list[int]:
    space = dimensions.spaces["layers"]
    return sorted(order[: sizes.get(space.field, space.size)])


def _parameters(dimensions: Dimensions, order: Sequence[int], sizes: Mapping[str, int]) -> int:
    return dimensions.parameters(sizes, _layers_left(dimensions, order, sizes))


def _smallest(config: Any, dimensions: Dimensions) -> dict[str, int]:
    """A token takes so many experts."""
    return dict.fromkeys(dimensions.fields("experts"), getattr(config, "num_experts_per_tok", 1))


def _cuts(
    dimensions: Dimensions, scores: Scores, sizes: Mapping[str, int], layers: Sequence[int]
) -> tuple[Cut, ...]:
    """Layers and experts come first: what goes with them needs no scores."""
    cuts: dict[str, Cut] = {}
    for dimension in DIMENSIONS:
        for space in dimensions.spaces.values():
            left = sizes.get(space.field, space.size)
            here = space.layer is None or space.layer in layers
            if space.dimension != dimension or left == space.size or not here:
                continue
            values = scores_of(space, scores)
            experts = cuts.get(space.name.rpartition(".")[0]) if space.rows is not None else None
            if experts is not None:
                values = values[experts.kept]
            cuts[space.name] = Cut(space, _ranking(values)[..., :left].sort(-1).values)
    return tuple(cuts[name] for name in dimensions.spaces if name in cuts)


def _ranking(values: Tensor) -> Tensor:
    """Indexes along the last dim, the highest score first; of equal ones the first."""
    return values.argsort(dim=-1, descending=True, stable=True)
