"""What a view makes of a cut, checked by reshaping a whole tensor and its shards."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from simulated_ranks import joined, part_of, values
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from flex_model.layouts.marks import (
    FOREIGN,
    TERM,
    UNKNOWN,
    WHOLE,
    Cut,
    Mark,
    OneOf,
    from_placement,
    reviewed,
    to_placement,
)

Shape = tuple[int, ...]

# The same examples on every run; no deadline, for a loaded machine is no mistake.
settle = settings(deadline=None, derandomize=True, max_examples=200, database=None)


@st.composite
def cut_shapes(draw: st.DrawFn, smallest: int = 1) -> tuple[Shape, Cut]:
    """A local shape and a cut that it can have."""
    shape = draw(st.lists(st.integers(smallest, 6), min_size=1, max_size=4))
    dim = draw(st.integers(0, len(shape) - 1))
    outer = draw(st.sampled_from([n for n in range(1, shape[dim] + 1) if shape[dim] % n == 0]))
    return tuple(shape), Cut(dim, outer)


@st.composite
def factors_of(draw: st.DrawFn, product: int, smallest: int = 1) -> Shape:
    """Any shape of as many entries."""
    shape, left = [], product
    while left > 1:
        divisors = [n for n in range(max(2, smallest), left + 1) if left % n == 0]
        shape.append(draw(st.sampled_from(divisors)))
        left //= shape[-1]
    for _ in range(draw(st.integers(0, 2)) if smallest == 1 else 0):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return tuple(shape)


def _scaled(shape: Shape, dim: int, ranks: int) -> Shape:
    return tuple(size * ranks if at == dim else size for at, size in enumerate(shape))


@settle
@given(st.data(), st.integers(2, 3))
def test_a_claimed_view_joins_to_the_whole_tensors_view(data: st.DataObject, ranks: int) -> None:
    """Catches a cut put on a dim, or behind blocks, where the shards do not lie."""
    before, mark = data.draw(cut_shapes())
    after = data.draw(factors_of(math.prod(before)))
    found = reviewed(mark, before, after)
    whole = values(*_scaled(before, mark.dim, ranks))
    parts = [part_of(whole, mark, rank, ranks).view(after) for rank in range(ranks)]
    for cut in _cuts_of(found):
        due = whole.view(_scaled(after, cut.dim, ranks))
        assert torch.equal(joined(cut, parts), due)


@settle
@given(st.data())
def test_a_view_and_back_is_the_cut_it_was(data: st.DataObject) -> None:
    """Catches a block count that is lost, or counted twice, on the way. Dims, and parts of blocks,
    are longer than 1, for where they are not two cuts fit one way that the entries lie.
    """
    before, mark = data.draw(cut_shapes(smallest=2))
    assume(mark.outer == 1 or before[mark.dim] > mark.outer)
    after = data.draw(factors_of(math.prod(before), smallest=2))
    there = reviewed(mark, before, after)
    assume(there is not UNKNOWN)
    assert reviewed(there, after, before) == mark


@settle
@given(st.data(), st.integers(2, 3))
def test_views_as_programs_write_them(data: st.DataObject, ranks: int) -> None:
    """Catches a guess where a local dim of length 1 (one head, one sample to a rank) leaves open
    which dim it became: the claim must fit what the program does on the whole tensor.
    """
    before, mark = data.draw(cut_shapes())
    program = data.draw(_written_views(before, mark))
    whole = values(*_scaled(before, mark.dim, ranks))
    after = tuple(program(part_of(whole, mark, 0, ranks)).shape)
    found = reviewed(mark, before, after)
    if found is UNKNOWN:
        return
    parts = [program(part_of(whole, mark, rank, ranks)) for rank in range(ranks)]
    due = program(whole)
    made = [joined(cut, parts) for cut in _cuts_of(found)]
    assert any(m.shape == due.shape and torch.equal(m, due) for m in made), (
        f"{mark} {before} -> {after} is claimed to be {found}"
    )


def _cuts_of(found: Mark) -> list[Cut]:
    """What is claimed: one cut, or one of several."""
    return (
        [found] if isinstance(found, Cut) else list(found.cuts) if isinstance(found, OneOf) else []
    )


@st.composite
def _written_views(
    draw: st.DrawFn, shape: Shape, mark: Cut
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Flatten, split off a fixed width, or add a dim: what code does without naming whole sizes."""
    kind = draw(st.sampled_from(["flatten", "split", "add a dim"]))
    if kind == "flatten":
        start = draw(st.integers(0, len(shape) - 1))
        end = draw(st.integers(start, len(shape) - 1))
        return lambda x: x.flatten(start, end)
    at = draw(st.integers(0, len(shape) - 1))
    if kind == "split":
        if at == mark.dim and mark.outer > 1:
            return lambda x: x.unflatten(at, (mark.outer, -1))
        width = draw(st.sampled_from([n for n in range(1, shape[at] + 1) if shape[at] % n == 0]))
        return lambda x: x.unflatten(at, (-1, width))
    return lambda x: x.view(*x.shape[:at], 1, *x.shape[at:])


@pytest.mark.parametrize(
    ("before", "mark", "after", "due"),
    [
        ((4, 5, 12), Cut(2), (4, 5, 3, 4), Cut(2)),  # features into heads
        ((4, 5, 3, 4), Cut(2), (4, 5, 12), Cut(2)),  # and back
        ((5, 4, 8), Cut(1), (20, 8), Cut(0, 5)),  # [sequence, batch] flattened
        ((20, 8), Cut(0, 5), (5, 4, 8), Cut(1)),
        ((4, 5, 8), Cut(0), (20, 8), Cut(0)),
        ((2, 3, 4, 5), Cut(1), (6, 4, 5), Cut(0, 2)),  # batch and heads merged, for bmm
        ((6, 4, 5), Cut(0, 2), (2, 3, 4, 5), Cut(1)),
        ((4, 24), Cut(1, 2), (4, 2, 12), Cut(2)),  # [gate | up] taken apart
        ((4, 24), Cut(1, 3), (4, 3, 2, 4), Cut(2)),  # [q | k | v] into heads
        ((4, 24), Cut(1), (4, 24), Cut(1)),
        ((4, 6), WHOLE, (24,), WHOLE),
        ((4, 6), TERM, (24,), TERM),
        ((4, 6), FOREIGN, (24,), FOREIGN),
        ((4, 6), UNKNOWN, (24,), UNKNOWN),
    ],
)
def test_known_idioms(before: Shape, mark: object, after: Shape, due: object) -> None:
    """Catches an idiom of real models that the algebra no longer follows."""
    assert reviewed(mark, before, after) == due  # type: ignore[arg-type]


@settle
@given(st.data())
def test_unknown_only_where_no_cut_is_true(data: st.DataObject) -> None:
    """Catches an algebra that gives up: every cut that the result could have is tried, and none
    joins to a view of the whole tensor. Dims of length 1 are left out: there, none is a right
    answer.
    """
    before, mark = data.draw(cut_shapes(smallest=2))
    after = data.draw(factors_of(math.prod(before), smallest=2))
    if reviewed(mark, before, after) is not UNKNOWN:
        return
    whole = values(*_scaled(before, mark.dim, 2))
    parts = [part_of(whole, mark, rank, 2).view(after) for rank in range(2)]
    for dim, size in enumerate(after):
        for outer in (n for n in range(1, size + 1) if size % n == 0):
            made = joined(Cut(dim, outer), parts)
            assert not torch.equal(made.flatten(), whole.flatten()), f"Cut({dim}, {outer}) is true"


@pytest.mark.parametrize(
    ("before", "mark", "after", "why"),
    [
        ((2, 6), Cut(1), (3, 4), "a shard's rows are 6 long, the new ones 4"),
        ((3, 4, 5), Cut(1), (5, 12), "the new rows begin in the midst of an old one"),
        ((0, 6), Cut(1), (0, 3, 2), "no entry tells which dim is which"),
    ],
)
def test_unknown_where_nothing_can_be_said(
    before: Shape, mark: Cut, after: Shape, why: str
) -> None:
    """Catches a guess."""
    assert reviewed(mark, before, after) is UNKNOWN, why


def test_placements_there_and_back() -> None:
    """Catches a placement whose blocks or negative dim are lost as it becomes a mark."""
    for placement in (Shard(1), Replicate(), Partial(), _StridedShard(2, split_factor=3)):
        assert to_placement(from_placement(placement, 3)) == placement
    assert from_placement(Shard(-1), 3) == Cut(2)
    assert from_placement(_StridedShard(-2, split_factor=2), 3) == Cut(1, 2)
    assert to_placement(UNKNOWN) is None
    assert to_placement(FOREIGN) is None
