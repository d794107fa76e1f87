"""What hooks on a sharded model will cost, from its config alone, in one process.

The model's tensors are fakes that have shapes and no values, and all ranks but the first are
imagined: torch's backend "fake" returns from every collective at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Partial, Replicate
from torch.distributed.tensor._redistribute import (
    _gen_transform_infos,
    clear_redistribute_planner_cache,
)
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from flex_model.distributed.cost import (
    Collective,
    peak_bytes,
    to_every_rank,
    to_one_rank,
    with_gradients,
)
from flex_model.distributed.mesh import build_mesh
from flex_model.layouts.layout import ActivationLayout
from flex_model.layouts.resolve import groups_of
from flex_model.report.layouts import Boundary, boundaries
from flex_model.report.transformers_config import from_config

__all__ = ["Cost", "Plan", "cost_of", "plan"]


@dataclass(frozen=True)
class Plan:
    """What a forward on imagined ranks showed.

    Attributes:
        modules: every module's name and class, in the model's order.
        boundaries: what passed them.
        sizes: ranks by mesh dim.
    """

    modules: tuple[tuple[str, str], ...]
    boundaries: tuple[Boundary, ...]
    sizes: dict[str, int]


@dataclass(frozen=True)
class Cost:
    """What hooks on one tensor cost in each call.

    Attributes:
        capture: collectives of a hook that only records, on the first rank.
        edit: of an edit of the whole tensor, in forward.
        backward: of the same in backward, the least.
        backward_most: the most: where nothing tells a gradient's placement before the first
            backward, it is whole on every rank, or a term of a sum.
        capture_peak: bytes that a capture holds at most on a rank, beside the model's own.
        edit_peak: the same of an edit, whose function makes one more tensor.
    """

    capture: Sequence[Collective]
    edit: Sequence[Collective]
    backward: Sequence[Collective]
    backward_most: Sequence[Collective]
    capture_peak: int
    edit_peak: int


def plan(
    config: Path, sizes: dict[str, int], dtype: torch.dtype, batch: int, sequence: int
) -> Plan:
    """Build the model of a config on imagined ranks and follow one forward.

    Args:
        config: a transformers ``config.json``, or a directory with one.
        sizes: ranks along "dp" and "tp".
        dtype: of parameters and activations.
        batch: sequences of each data-parallel rank.
        sequence: tokens of each.
    """
    tp, dp = sizes["tp"], sizes["dp"]
    with imagined(tp * dp):
        fakes = FakeTensorMode()
        model = from_config(config, dtype, tp, dp, fakes)
        mesh = build_mesh(sizes, None, groups_of(model), "cpu")
        with fakes:
            ids = torch.zeros(batch, sequence, dtype=torch.int64)
            found = boundaries(model, mesh, lambda: model(ids))
        modules = tuple((name, type(module).__name__) for name, module in model.named_modules())
    return Plan(modules, tuple(found), sizes)


def cost_of(boundary: Boundary) -> Cost | None:
    """What hooks on a tensor cost; None where nothing tells how it lies."""
    layout, shape, item = boundary.layout, boundary.shape, boundary.dtype.itemsize
    if layout is None:
        return None
    whole = prod(boundary.whole) * item
    least = with_gradients(layout, Replicate()).transposed()
    most = with_gradients(layout, Partial()).transposed()
    if not boundary.dtype.is_floating_point:  # no gradients
        least = most = ActivationLayout()
    return Cost(
        capture=to_one_rank(layout, shape, item),
        edit=to_every_rank(layout, shape, item),
        backward=to_every_rank(least, shape, item),
        backward_most=to_every_rank(most, shape, item),
        capture_peak=peak_bytes(layout, shape, item, one=True),
        edit_peak=max(
            2 * whole + prod(shape) * item * (not layout.trivial),
            *(peak_bytes(each, shape, item) for each in (layout, least, most)),
        ),
    )


@contextmanager
def imagined(ranks: int) -> Iterator[None]:
    """In a process group of so many ranks, of which this process is the first and only one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # Of meshes: another plan's of the same shape would pass for these.
        _clear_sharding_prop_cache()
        clear_redistribute_planner_cache()
        _gen_transform_infos.cache_clear()
