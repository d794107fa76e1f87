"""Which part of the whole tensor a local editing function holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flex_model.distributed.mesh import ParallelMesh
from flex_model.distributed.routing import disassemble
from flex_model.layouts.layout import ActivationLayout, DimLayout, is_sharded, shard_dim

__all__ = ["LocalShard"]


class LocalShard:
    """This rank's part of the tensor that an editing function declared to need only a part of.

    Attributes:
        whole_shape: sizes of the whole tensor.
        shape: sizes of the part.
    """

    def __init__(self, shape: Sequence[int], layout: ActivationLayout, mesh: ParallelMesh) -> None:
        self.shape = torch.Size(shape)
        self.whole_shape = layout.whole_shape(self.shape)
        self._layout = layout
        self._mesh = mesh

    @property
    def dims(self) -> set[int]:
        """The tensor dims that are cut here."""
        return {_at(dim) % len(self.shape) for dim in self._layout.dims}

    def positions(self, dim: int = -1) -> Tensor:
        """Where this rank's entries along a dim stand in the whole: ``[shape[dim]]``, int64."""
        dim %= len(self.shape)
        everything = torch.arange(self.whole_shape[dim])
        return self._part(everything, 0, dim)

    def take(self, whole: Tensor, dim: int = -1, of: int = -1) -> Tensor:
        """This rank's part of a tensor that is whole: a per-channel weight, a mask.

        Args:
            whole: holds, along ``dim``, an entry for every entry of the whole activation.
            dim: dim of ``whole``.
            of: the activation's dim that it belongs to.

        Returns:
            ``whole`` with ``dim`` cut to this rank's length; differentiable.
        """
        return self._part(whole, dim % whole.ndim, of % len(self.shape))

    def take_aligned(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor that broadcasts against the whole activation."""
        extra = len(self.shape) - whole.ndim
        for dim in self.dims:
            at = dim - extra
            if at >= 0 and whole.shape[at] == self.whole_shape[dim]:
                whole = self.take(whole, at, dim)
        return whole

    def embed_aligned(self, part: Tensor) -> Tensor:
        """Zeros that broadcast against the whole, with this rank's part in its place."""
        extra = len(self.shape) - part.ndim
        sizes, rows = list(part.shape), [torch.arange(size) for size in part.shape]
        for dim in self.dims:
            at = dim - extra
            if at >= 0 and part.shape[at] == self.shape[dim]:
                sizes[at], rows[at] = self.whole_shape[dim], self.positions(dim)
        whole = part.new_zeros(sizes)
        if part.ndim == 0:
            return part.clone()
        whole[torch.meshgrid([row.to(part.device) for row in rows], indexing="ij")] = part
        return whole

    def _part(self, whole: Tensor, at: int, dim: int) -> Tensor:
        """Cut dim ``at`` as the activation's ``dim`` is cut."""
        cuts = [d.on(at) for d in self._layout.dims if _at(d) % len(self.shape) == dim]
        return disassemble(whole, ActivationLayout(tuple(cuts)), self._mesh) if cuts else whole


def _at(dim: DimLayout) -> int:
    if dim.value is None or not is_sharded(dim.value):
        raise RuntimeError(f"internal: {dim.name} is not cut, so no shard is local over it")
    return shard_dim(dim.value)
