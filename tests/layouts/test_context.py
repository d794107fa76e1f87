"""How activations lie over context-parallel ranks: order, nesting, and what is refused."""

import pytest
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from flex_model.errors import LayoutError
from flex_model.layouts.layout import DimLayout
from flex_model.layouts.marks import WHOLE, Cut, Mark
from flex_model.layouts.resolve import Known, resolve

SIZES = {"dp": 3, "cp": 2, "tp": 2}


def _resolved(
    shape: tuple[int, ...], marks: dict[str, Mark], **options: object
) -> dict[str, DimLayout]:
    known = Known("a test", SIZES, shape, marks=marks, **options)  # type: ignore[arg-type]
    return {dim.name: dim for dim in resolve(known).dims}


def test_a_loss_of_its_own_on_each_rank() -> None:
    """Catches gradients taken for those of one loss: over cp as over dp they are averaged."""
    found = _resolved((2, 4, 8), {"dp": Cut(0), "cp": Cut(1), "tp": WHOLE})
    assert found["cp"].gradient_scale == 1 / 2
    assert found["dp"].gradient_scale == 1 / 3
    assert found["tp"].gradient_scale == 1
    summed = _resolved((2, 4, 8), {"cp": Cut(1)}, loss="sum")
    assert summed["cp"].gradient_scale == 1
    whole = _resolved((2, 4, 8), {"cp": WHOLE})
    assert whole["cp"].gradient == Partial("avg")
    assert _resolved((2, 4, 8), {"cp": WHOLE}, loss="sum")["cp"].gradient == Partial("sum")


def test_only_context_ranks_hold_chunks_there_and_back() -> None:
    """Catches a batch or features in an order that no rank holds them in."""
    found = _resolved((2, 4, 8), {"dp": Cut(0), "cp": Cut(1), "tp": Cut(2)})
    assert [dim.zigzag for dim in found.values()] == [False, True, False]
    plain = _resolved((2, 3, 8), {"cp": Cut(1)}, zigzag=False)
    assert not plain["cp"].zigzag


@pytest.mark.parametrize(
    ("marks", "due"),
    [
        # Tokens flattened as [batch, sequence] and as [sequence, batch], 2 samples of 4 positions.
        ({"dp": Cut(0), "cp": Cut(0, 2)}, {"dp": Shard(0), "cp": _StridedShard(0, split_factor=2)}),
        ({"dp": Cut(0, 4), "cp": Cut(0)}, {"dp": _StridedShard(0, split_factor=8), "cp": Shard(0)}),
        # The same with the sequence cut once more, over tensor ranks.
        (
            {"dp": Cut(0, 4), "cp": Cut(0), "tp": Cut(0)},
            {"dp": _StridedShard(0, split_factor=16), "cp": Shard(0), "tp": Shard(0)},
        ),
    ],
)
def test_blocks_of_what_several_mesh_dims_cut(
    marks: dict[str, Mark], due: dict[str, Placement]
) -> None:
    """Catches blocks counted on the rank's tensor: inner mesh dims are assembled before."""
    found = _resolved((8, 5), marks)
    assert {name: found[name].value for name in due} == due


def test_a_part_that_is_no_two_chunks_is_refused() -> None:
    """Catches a sequence cut in the middle of a chunk: its halves would come back in disorder."""
    with pytest.raises(LayoutError, match=r"a test: over cp \(2 ranks\) dim 1 .*multiple of 4.*"):
        _resolved((2, 3, 8), {"cp": Cut(1)})
    with pytest.raises(LayoutError, match="holds 3 entries"):
        _resolved((6, 8), {"cp": Cut(0, 2)})  # of two samples in a row
    with pytest.raises(LayoutError, match="context_order"):
        _resolved((2, 3, 8), {}, placements={"cp": Shard(1)})
    # Three positions on each of two tensor ranks are six on the context rank.
    found = _resolved((3, 8), {"cp": Cut(0), "tp": Cut(0)})
    assert found["cp"].value == Shard(0)
    assert _resolved((2, 3, 8), {"cp": WHOLE})["cp"].value == Replicate()
