"""``expected_shape``: the whole tensor's sizes as the user expects them, checked before use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.distributed.tensor import Shard

from flex_model.errors import HintError
from flex_model.layouts.layout import ActivationLayout, is_sharded, shard_dim

__all__ = ["apply_expected_shape"]

Hint = Sequence[int | None]


def apply_expected_shape(
    layout: ActivationLayout, local_shape: Sequence[int], hint: Hint, where: str
) -> ActivationLayout:
    """The layout as the hint settles it.

    A size that differs from the local one cuts that dim over a mesh dim whose placement is not
    known otherwise. A size of a known layout must be the whole one. Over data-parallel ranks the
    rank's own batch size is accepted too: flex-model 0.1.0 took no notice of dp in its hints.

    Args:
        layout: what is known; ``value`` None over mesh dims where nothing told.
        local_shape: sizes of this rank's tensor.
        hint: one whole size per dim, None where it is to be filled in.
        where: module and rank, for the message.

    Raises:
        HintError: another number of dims, or a size the ranks cannot hold.
    """

    def refuse(rule: str) -> HintError:
        return HintError(
            f"{where}: expected_shape {tuple(hint)} does not fit the local shape "
            f"{tuple(local_shape)} ({layout.describe()}): {rule}"
        )

    if len(hint) != len(local_shape):
        raise refuse(f"it has {len(hint)} sizes, the activation {len(local_shape)} dims.")
    whole = layout.whole_shape(tuple(local_shape))
    for dim, size in enumerate(hint):
        if size is None or size == whole[dim] or size == _whole_but_dp(layout, local_shape, dim):
            continue
        settled = _settle(layout, dim, size, local_shape[dim])
        if settled is None:
            raise refuse(_rule_broken(layout, dim, size, local_shape[dim], whole[dim]))
        layout = settled
    return layout


def _settle(layout: ActivationLayout, dim: int, size: int, local: int) -> ActivationLayout | None:
    """Cut ``dim`` over the mesh dim of unknown placement that the size is a multiple over."""
    for at, mesh_dim in enumerate(layout.dims):
        if mesh_dim.value is None and local * mesh_dim.size == size:
            cut = replace(mesh_dim, value=Shard(dim), gradient=mesh_dim.gradient or Shard(dim))
            return ActivationLayout((*layout.dims[:at], cut, *layout.dims[at + 1 :]))
    return None


def _rule_broken(layout: ActivationLayout, dim: int, size: int, local: int, whole: int) -> str:
    if whole != local:
        return f"dim {dim} is sharded and {whole} in the whole, not {size}. Leave it None."
    multiples = [d.name for d in layout.dims if local * d.size == size]
    if multiples:
        return (
            f"dim {dim} holds {local} on every rank along {multiples[0]} and is the same there, so "
            f"gathering it to {size} would repeat it. Give {local} or None."
        )
    sizes = {d.name: d.size for d in layout.dims}
    return (
        f"{size} on dim {dim} is neither the local size {local} nor a multiple of it over the mesh "
        f"{sizes}. Give the whole size, or None."
    )


def _whole_but_dp(layout: ActivationLayout, local_shape: Sequence[int], dim: int) -> int | None:
    """The batch of this rank alone, where `dim` is the batch."""
    without = ActivationLayout(tuple(d for d in layout.dims if d.name != "dp"))
    is_batch = any(
        d.name == "dp" and is_sharded(d.value) and shard_dim(d.value) == dim  # type: ignore[arg-type]
        for d in layout.dims
    )
    return without.whole_shape(tuple(local_shape))[dim] if is_batch else None
