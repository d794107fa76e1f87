"""Whole shapes from local ones, by arithmetic alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_ranks import joined, part_of, values
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from flex_model.layouts.layout import (
    ActivationLayout,
    DimLayout,
    block_count,
    gradient_of,
    is_sharded,
    replicated,
)
from flex_model.layouts.marks import Cut

Shape = tuple[int, ...]


def _dim(name: str, size: int, value: Placement | None, **options: object) -> DimLayout:
    return DimLayout(name, size, value, gradient_of(value), **options)  # type: ignore[arg-type]


def _whole(local: Shape, *dims: DimLayout) -> Shape:
    return tuple(ActivationLayout(dims).whole_shape(local))


@pytest.mark.parametrize(
    ("local", "dims", "due"),
    [
        ((2, 3), (), (2, 3)),
        ((2, 3), (_dim("tp", 4, Replicate()),), (2, 3)),
        ((2, 3), (_dim("tp", 4, Partial()),), (2, 3)),
        ((2, 3), (_dim("tp", 4, None),), (2, 3)),
        ((2, 3), (_dim("tp", 4, Shard(1)),), (2, 12)),
        ((2, 6), (_dim("tp", 4, _StridedShard(1, split_factor=2)),), (2, 24)),
        ((2, 3), (_dim("dp", 2, Shard(0)), _dim("tp", 4, Shard(1))), (4, 12)),
        ((2, 3), (_dim("dp", 2, Shard(1)), _dim("tp", 4, Shard(1))), (2, 24)),
        ((2, 3), (_dim("dp", 2, Replicate()), _dim("tp", 4, Shard(0))), (8, 3)),
    ],
)
def test_even_shards(local: Shape, dims: tuple[DimLayout, ...], due: Shape) -> None:
    """Catches a mesh dim left out, or one that multiplies what it does not cut."""
    assert _whole(local, *dims) == due


@pytest.mark.parametrize(
    ("whole", "ranks", "sizes"), [(5, 2, (3, 2)), (9, 4, (3, 3, 3, 0)), (1, 3, (1, 0, 0))]
)
def test_uneven_shards(whole: int, ranks: int, sizes: tuple[int, ...]) -> None:
    """Catches a rank that multiplies its own length: ranks must agree on the whole, and one of them
    may hold nothing.
    """
    for rank in range(ranks):
        dim = _dim("tp", ranks, Shard(1), shard_sizes=sizes)
        assert _whole((4, sizes[rank]), dim) == (4, whole)


def test_uneven_shards_within_blocks() -> None:
    """Catches sizes counted over the whole dim in place of one block: ragged batches of tokens
    flattened as [sequence, batch].
    """
    sizes, sequence = (3, 1), 5
    dim = _dim("dp", 2, _StridedShard(0, split_factor=sequence), shard_sizes=sizes)
    for own in sizes:
        assert _whole((sequence * own, 7), dim) == (sequence * 4, 7)


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.data(),
)
def test_two_mesh_dims_joined_in_their_order(inner: list[int], data: st.DataObject) -> None:
    """Catches the wrong order, where both mesh dims cut one tensor dim: the last is joined first,
    and the blocks of the first are counted on what that made.
    """
    at = st.integers(0, len(inner) - 1)
    dp, tp = Cut(data.draw(at)), Cut(data.draw(at), data.draw(st.integers(1, 2)))
    local = list(inner)
    local[tp.dim] *= tp.outer
    dims = tuple(
        _dim(name, size, _StridedShard(cut.dim, split_factor=cut.outer))
        for name, size, cut in (("dp", 2, dp), ("tp", 3, tp))
    )
    shape = _whole(tuple(local), *dims)
    whole = values(*shape)
    by_dp = [part_of(whole, dp, rank, 2) for rank in range(2)]
    parts = [[part_of(part, tp, rank, 3) for rank in range(3)] for part in by_dp]
    assert all(part.shape == torch.Size(local) for row in parts for part in row)
    assert torch.equal(joined(dp, [joined(tp, row) for row in parts]), whole)


def test_a_layout_and_its_gradients() -> None:
    """Catches value and gradient mixed up in the layout of the gradient."""
    dim = DimLayout("dp", 2, Shard(0), Partial(), None, 1.0, 0.5)
    turned = dim.transposed()
    assert (turned.value, turned.gradient) == (Partial(), Shard(0))
    assert (turned.value_scale, turned.gradient_scale) == (0.5, 1.0)
    assert turned.transposed() == dim
    layout = ActivationLayout((dim, replicated("tp", 2)))
    assert layout.transposed().transposed() == layout


def test_what_a_value_tells_of_its_gradient() -> None:
    """Catches a guess: a replicated value tells nothing of its gradient."""
    assert gradient_of(Shard(1)) == Shard(1)
    assert gradient_of(Partial()) == Replicate()
    assert gradient_of(Replicate()) is None
    assert gradient_of(None) is None


def test_what_a_layout_says_of_itself() -> None:
    """Catches a layout taken to be trivial, or told, because one of its mesh dims is."""
    none = ActivationLayout()
    assert none.trivial
    assert none.told
    assert not none.moves_value
    whole, cut = replicated("tp", 2), _dim("tp", 2, Shard(0))
    term = DimLayout("tp", 2, Replicate(), Partial())
    assert ActivationLayout((whole,)).trivial
    assert not ActivationLayout((whole, cut)).trivial
    assert ActivationLayout((whole, cut)).moves_value
    assert not ActivationLayout((term,)).trivial
    assert not ActivationLayout((term,)).moves_value
    assert ActivationLayout((term,)).told
    assert not ActivationLayout((cut, _dim("tp", 2, Replicate()))).told
    assert ActivationLayout((_dim("tp", 2, Partial()),)).moves_value


def test_strided_shards_are_shards() -> None:
    """Catches torch's strided shard, which is no ``Shard``, taken for replicated."""
    strided = _StridedShard(0, split_factor=2)
    assert is_sharded(strided)
    assert block_count(strided) == 2
    assert block_count(Shard(0)) == 1
    assert not is_sharded(Partial())
    assert not is_sharded(None)


def test_the_message_names_dims_sizes_and_what_is_not_told() -> None:
    """Catches a message from which the reader could not tell the mesh or the gradient."""
    layout = ActivationLayout((_dim("dp", 2, Shard(0)), _dim("tp", 3, Replicate())))
    text = layout.describe()
    assert "dp(2)" in text
    assert "tp(3)" in text
    assert "not told" in text
    assert ActivationLayout().describe() == "one process"
