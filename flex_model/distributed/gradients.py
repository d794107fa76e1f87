"""Gradient placements that nothing tells: measured in the first backward, then remembered.

A replicated value says nothing of its gradient: behind a norm that feeds column-parallel layers the
framework has already summed it over the ranks, behind a rotary table each rank holds its own heads'
term. The two cases look very different in the data, so the first backward compares the ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate
from torch.distributed.tensor.placement_types import Placement

from flex_model.distributed.collectives import all_reduce_sum, exchanged, reduced
from flex_model.distributed.communicator import Communicator
from flex_model.distributed.mesh import ParallelMesh
from flex_model.errors import GradientPlacementError
from flex_model.layouts.layout import ActivationLayout, DimLayout

__all__ = ["GradientMemory", "ranks_agree"]

# Ranks that agree to within rounding hold the gradient whole; ranks that differ by more than a
# hundredth of its largest value hold terms of a sum. Nothing lies between in a sound model.
_DIFFERENT = 1e-2
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
_ROUNDING_OF_SHORT_FLOATS = 5e-3
_MAX_DIMS = 16


@dataclass
class GradientMemory:
    """What was measured at one hook point, by mesh dim, and how often its gather ran backward.

    Attributes:
        where: module and hook kind, for messages.
        placements: measured gradient placement by mesh dim.
        gather_backwards: gathers whose backward ran (a loss term on the gathered tensor does it);
            ranks compare it, for a term computed on some ranks only is a silently wrong gradient.
            Behind an edit that is differentiated it runs on every rank, and does not show that.
    """

    where: str
    placements: dict[str, Placement] = field(default_factory=dict)
    gather_backwards: int = 0

    def count_gather_backward(self) -> None:
        self.gather_backwards += 1

    def known(self, layout: ActivationLayout) -> ActivationLayout:
        """The layout with gradient placements filled in as far as they were measured."""
        if layout.told:
            return layout
        return ActivationLayout(
            tuple(
                replace(dim, gradient=self.placements.get(dim.name))
                if dim.gradient is None
                else dim
                for dim in layout.dims
            )
        )

    def decided(self, layout: ActivationLayout, gradient: Tensor) -> ActivationLayout:
        """The layout with every gradient placement known, or a named refusal.

        An all-zero gradient is right under either placement, so it is let through.
        """
        layout = self.known(layout)
        if layout.told:
            return layout
        if not torch.count_nonzero(gradient):
            return _assumed_replicated(layout)
        undecided = ", ".join(dim.name for dim in layout.dims if dim.gradient is None)
        raise GradientPlacementError(
            f"{self.where}: gradients reach the whole tensor {tuple(gradient.shape)}, but over "
            f"{undecided} nothing tells whether this activation's own gradient is whole on every "
            "rank or a term of a sum, and no gradient came back through the module's output to "
            'measure it. Pass HookFunction(..., gradients={"tp": Replicate()}) or Partial().'
        )

    def measured(
        self, layout: ActivationLayout, gradient: Tensor, mesh: ParallelMesh
    ) -> ActivationLayout:
        """The layout with every gradient placement known, measured on ``gradient`` where not.

        Collective over the mesh dims in question.

        Raises:
            GradientPlacementError: the ranks neither agree nor clearly differ.
        """
        layout = self.known(layout)
        for dim in reversed(layout.dims):
            if dim.gradient is None:
                placement = _measure(gradient, dim, mesh, self.where)
                if placement is not None:
                    self.placements[dim.name] = placement
        return _assumed_replicated(self.known(layout))


def _assumed_replicated(layout: ActivationLayout) -> ActivationLayout:
    """Fill in what only a zero gradient leaves open: zero is whole and a sum of zeros alike."""
    return ActivationLayout(
        tuple(
            replace(dim, gradient=Replicate()) if dim.gradient is None else dim
            for dim in layout.dims
        )
    )


def _measure(gradient: Tensor, dim: DimLayout, mesh: ParallelMesh, where: str) -> Placement | None:
    """Compare a gradient over one mesh dim; None where it is zero on every rank."""
    relative = relative_deviation(gradient, mesh.along(dim.name))
    if relative is None:
        return None
    if relative <= _rounding(gradient.dtype):
        return Replicate()
    if relative >= _DIFFERENT:
        return Partial()
    raise GradientPlacementError(
        f"{where}: over {dim.name} the ranks' gradients of shape {tuple(gradient.shape)} differ by "
        f"{relative:.1e} of their largest value: too much for rounding, too little for terms of a "
        f'sum. Pass HookFunction(..., gradients={{"{dim.name}": Replicate()}}) or Partial().'
    )


def ranks_agree(value: Tensor, group: Communicator) -> bool:
    """Whether every rank of the group holds the same tensor, up to rounding. Collective."""
    relative = relative_deviation(value, group)
    return relative is None or relative <= _rounding(value.dtype)


def relative_deviation(value: Tensor, group: Communicator) -> float | None:
    """Largest difference from the ranks' mean, over the largest value; None if all is zero.

    Infinite where the ranks' shapes differ: comparing those would end the process.
    """
    if len(set(exchanged(_shape_code(value), value.device, group))) > 1:
        return math.inf
    wide = value.dtype in (torch.float64, torch.int64, torch.int32)
    exact = value.detach().to(torch.float64 if wide else torch.float32, copy=True).contiguous()
    total = all_reduce_sum(exact, group)
    extremes = exact.new_zeros(2)
    if exact.numel():
        # Infinities (masks) are the same everywhere or they differ as a count does.
        difference = torch.nan_to_num(exact - total / group.size, nan=0.0, posinf=1e30)
        extremes[0] = difference.abs().max()
        extremes[1] = torch.nan_to_num(exact, posinf=1e30, neginf=-1e30).abs().max()
    deviation, largest = reduced(extremes, group, dist.ReduceOp.MAX).tolist()
    return None if largest == 0.0 else deviation / largest


def _shape_code(value: Tensor) -> list[int]:
    return [value.ndim, *value.shape, *[0] * (_MAX_DIMS - value.ndim)]


def _rounding(dtype: torch.dtype) -> float:
    if not dtype.is_floating_point:
        return 0.0
    return _ROUNDING.get(dtype, _ROUNDING_OF_SHORT_FLOATS)
