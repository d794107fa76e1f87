"""What ``expected_shape`` is accepted, what it settles, and what is refused."""

import re

import pytest
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from flex_model.errors import HintError
from flex_model.layouts.hints import Hint, apply_expected_shape
from flex_model.layouts.layout import ActivationLayout, DimLayout, gradient_of

LOCAL = (2, 7, 8)


def _layout(**values: tuple[int, Placement | None]) -> ActivationLayout:
    return ActivationLayout(
        tuple(
            DimLayout(name, size, value, gradient_of(value))
            for name, (size, value) in values.items()
        )
    )


SHARDED = _layout(tp=(2, Shard(2)))
WHOLE = _layout(tp=(2, Replicate()))
UNTOLD = _layout(tp=(2, None))
BATCH = _layout(dp=(2, Shard(0)), tp=(2, Shard(2)))
BATCH_UNTOLD = _layout(dp=(2, Shard(0)), tp=(2, None))


@pytest.mark.parametrize(
    ("layout", "hint"),
    [
        (SHARDED, (2, 7, 16)),
        (SHARDED, (None, None, 16)),
        (SHARDED, (None, None, None)),
        (WHOLE, (2, 7, 8)),
        (WHOLE, (None, 7, None)),
        (UNTOLD, (2, 7, 8)),
        (UNTOLD, (None, None, 8)),
        (BATCH, (4, 7, 16)),
        (BATCH, (2, 7, 16)),  # the rank's own batch: flex-model 0.1.0 knew no dp in its hints
        (BATCH, (None, 7, None)),
        (ActivationLayout(), (2, 7, 8)),
    ],
)
def test_a_hint_that_fits_changes_nothing(layout: ActivationLayout, hint: Hint) -> None:
    """Catches a right hint that is refused, or that overrules what is known."""
    assert apply_expected_shape(layout, LOCAL, hint, "here") == layout


@pytest.mark.parametrize(
    ("layout", "hint", "tp"),
    [
        (UNTOLD, (2, 7, 16), Shard(2)),
        (UNTOLD, (None, 14, None), Shard(1)),
        (UNTOLD, (4, 7, 8), Shard(0)),
        (BATCH_UNTOLD, (2, 7, 16), Shard(2)),
        (BATCH_UNTOLD, (4, 7, 16), Shard(2)),
    ],
)
def test_a_hint_settles_what_nothing_told(
    layout: ActivationLayout, hint: Hint, tp: Placement
) -> None:
    """Catches a hint that is checked but not used: the shard would be handed out as the whole."""
    dim = apply_expected_shape(layout, LOCAL, hint, "here").dims[-1]
    assert dim.value == tp
    assert dim.gradient == tp


@pytest.mark.parametrize(
    ("layout", "hint", "rule"),
    [
        (SHARDED, (2, 16), "2 sizes"),
        (SHARDED, (1, 2, 7, 16), "4 sizes"),
        (SHARDED, (), "0 sizes"),
        (SHARDED, (2, 7, 8), "sharded and 16 in the whole"),
        (SHARDED, (2, 7, 32), "sharded and 16 in the whole"),
        (SHARDED, (99, 7, 16), "99 on dim 0"),
        (SHARDED, (4, 7, 16), "same there"),
        (SHARDED, (2, 14, 16), "same there"),
        (WHOLE, (2, 14, 8), "same there"),
        (WHOLE, (None, 9, 8), "9 on dim 1"),
        (WHOLE, (2, 7, 99), "99 on dim 2"),
        (UNTOLD, (2, 7, 24), "24 on dim 2"),
        (UNTOLD, (2, 7, 12), "12 on dim 2"),
        (UNTOLD, (2, 7, 4), "4 on dim 2"),
        (UNTOLD, (1, 7, 8), "1 on dim 0"),
        (UNTOLD, (2, 7, 0), "0 on dim 2"),
        (UNTOLD, (2, 7, -1), "-1 on dim 2"),
        (UNTOLD, (4, 7, 16), "dim 2"),  # one mesh dim cannot cut two tensor dims
        (BATCH, (1, 7, 16), "sharded and 4 in the whole"),
        (BATCH, (8, 7, 16), "sharded and 4 in the whole"),
        (BATCH, (4, 14, 16), "same there"),
        (ActivationLayout(), (2, 7, 16), "16 on dim 2"),
        (ActivationLayout(), (2, 7), "2 sizes"),
    ],
)
def test_a_hint_that_cannot_be_is_refused(layout: ActivationLayout, hint: Hint, rule: str) -> None:
    """Catches a hint of other rank, of a size the ranks cannot hold, or one that would repeat a
    replicated dim: flex-model 0.1.0 took all of them.
    """
    with pytest.raises(HintError, match=re.escape(rule)) as caught:
        apply_expected_shape(layout, LOCAL, hint, "mlp (forward, rank 1)")
    message = str(caught.value)
    assert "mlp (forward, rank 1)" in message
    assert str(tuple(hint)) in message
    assert str(LOCAL) in message
    assert isinstance(caught.value, ValueError)


def test_uneven_shards_are_taken_at_their_whole() -> None:
    """Catches a whole size refused because it is no multiple of this rank's own."""
    dim = DimLayout("tp", 2, Shard(2), Shard(2), shard_sizes=(3, 2))
    layout = ActivationLayout((dim,))
    for own in (3, 2):
        assert apply_expected_shape(layout, (2, 7, own), (2, 7, 5), "here") == layout
        with pytest.raises(HintError):
            apply_expected_shape(layout, (2, 7, own), (2, 7, 6), "here")


def test_ragged_batches_are_taken_at_either_size() -> None:
    """Catches the rank's own batch refused where the ranks' batches differ."""
    dim = DimLayout("dp", 2, Shard(0), Shard(0), shard_sizes=(3, 1), gradient_scale=0.5)
    for own in (3, 1):
        for batch in (None, own, 4):
            layout = ActivationLayout((dim,))
            assert apply_expected_shape(layout, (own, 8), (batch, 8), "here") == layout


def test_a_dim_that_two_mesh_dims_cut() -> None:
    """Catches the batch told from the flattened whole: over dp alone, or over both."""
    layout = _layout(dp=(2, _StridedShard(0, split_factor=5)), tp=(3, Shard(0)))
    local = (10, 4)
    assert apply_expected_shape(layout, local, (60, 4), "here") == layout
    with pytest.raises(HintError):
        apply_expected_shape(layout, local, (20, 4), "here")
