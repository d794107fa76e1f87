"""The arithmetic of costs against the collectives and the memory of the real thing."""

from dataclasses import dataclass

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from flex_model.distributed.cost import Collective, peak_bytes, to_every_rank, to_one_rank
from flex_model.distributed.mesh import build_mesh
from flex_model.distributed.routing import assemble, assemble_on
from flex_model.layouts.layout import ActivationLayout, DimLayout
from flex_model.testing.ranks import run_ranks
from traffic import Counting, Memory

SHAPE = (6, 4, 10)
_TIMES = 8


def _layout(*dims):
    """One mesh dim per placement; a tuple adds more of what a layout may say."""
    names = ("tp",) if len(dims) == 1 else ("dp", "tp")
    found = []
    for name, dim in zip(names, dims, strict=True):
        placement, more = dim if isinstance(dim, tuple) else (dim, {})
        found.append(DimLayout(name, 2, placement, placement, **more))
    return ActivationLayout(tuple(found))


LAYOUTS = {
    "shard": _layout(Shard(2)),
    "shard of dim 0": _layout(Shard(0)),
    "blocks": _layout(_StridedShard(2, split_factor=5)),
    "uneven": _layout((Shard(2), {"shard_sizes": (10, 7)})),
    "uneven blocks": _layout((_StridedShard(2, split_factor=2), {"shard_sizes": (5, 3)})),
    "zigzag": _layout((Shard(0), {"zigzag": True})),
    "sum": _layout(Partial()),
    "mean": _layout(Partial("avg")),
    "scaled": _layout((Shard(2), {"value_scale": 0.5})),
    "replicated": _layout(Replicate()),
    "both cut": _layout(Shard(0), Shard(2)),
    "both cut, scaled": _layout((Shard(0), {"value_scale": 0.5}), Shard(2)),
    "only dp cut": _layout(Shard(1), Replicate()),
    "only tp cut": _layout(Replicate(), Shard(2)),
    "sum of cut": _layout(Shard(1), Partial()),
    "mean over dp": _layout(Partial("avg"), Shard(2)),
}


@dataclass
class _Found:
    received: int
    kinds: set[str]
    peak: int


def _local(layout, rank):
    shape = list(SHAPE)
    for dim in layout.dims:
        if dim.shard_sizes is not None:
            blocks = getattr(dim.value, "split_factor", 1)
            shape[dim.value.dim] = blocks * dim.shard_sizes[rank % 2]
    return torch.ones(shape)


def _peak(work, local, layout, mesh):
    with Memory(local) as memory:
        work(local, layout, mesh)
    return memory.peak


def _measured(names):
    found = {}
    for name in names:
        layout = LAYOUTS[name]
        mesh = build_mesh({dim.name: dim.size for dim in layout.dims}, None, {}, "cpu")
        local = _local(layout, mesh.rank)
        for way, work in (("all", assemble), ("one", lambda *of: assemble_on(*of, 0))):
            with Counting() as counting:
                work(local, layout, mesh)
            # gloo's threads may hold a buffer for a moment after its collective has ended.
            peak = min(_peak(work, local, layout, mesh) for _ in range(_TIMES))
            received = sum(number * count for (_, number), count in counting.seen.items())
            kinds = {kind for kind, _ in counting.seen}
            found[name, way] = _Found(received, kinds, peak)
    return found


KINDS = {"all-gather": "_allgather_base_", "gather": "gather_", "all-reduce": "allreduce_"}


@pytest.mark.parametrize("ranks", [2, 4])
def test_costs_are_those_of_the_real_thing(ranks):
    """Catches a formula that forgets a group, a padding, or a copy."""
    names = [name for name, layout in LAYOUTS.items() if 2 ** len(layout.dims) == ranks]
    by_rank = run_ranks(_measured, ranks, names)
    for name in names:
        layout = LAYOUTS[name]
        shape = tuple(_local(layout, 0).shape)
        costs = {"all": to_every_rank(layout, shape, 4), "one": to_one_rank(layout, shape, 4)}
        for way, due in costs.items():
            found = [rank[name, way] for rank in by_rank]
            assert sum(f.received for f in found) == sum(c.received for c in due), (name, way)
            assert set().union(*(f.kinds for f in found)) == {KINDS[c.kind] for c in due}
            # On the first rank: of uneven shards the longest, which is not padded.
            assert found[0].peak == peak_bytes(layout, shape, 4, one=way == "one"), (name, way)


def test_what_ranks_receive():
    """Catches a formula that was only ever compared with itself."""
    assert Collective("all-gather", "tp", 4, 2, 100).received == 2 * 4 * 3 * 100
    assert Collective("gather", "tp", 4, 2, 100).received == 2 * 3 * 100
    assert Collective("all-reduce", "tp", 4, 2, 100).received == 2 * 4 * (2 * 3 * 100 // 4)


def test_an_unknown_placement_has_no_cost():
    layout = ActivationLayout((DimLayout("tp", 2, None, None),))
    with pytest.raises(ValueError, match="over tp is not known"):
        to_every_rank(layout, SHAPE, 4)
