"""Which part of the whole tensor a local editing function holds."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from flex_model.distributed.collectives import all_reduce_sum
from flex_model.distributed.communicator import Communicator
from flex_model.distributed.mesh import ParallelMesh
from flex_model.distributed.routing import assemble, disassemble
from flex_model.layouts.layout import (
    ActivationLayout,
    DimLayout,
    block_count,
    is_sharded,
    shard_dim,
)

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

    @property
    def cut_dims(self) -> dict[str, int]:
        """The mesh dims that cut the tensor here, each with the tensor dim that it cuts."""
        return {dim.name: _at(dim) % len(self.shape) for dim in self._layout.dims}

    def along(self, name: str) -> Communicator:
        """The ranks that hold other parts along one mesh dim."""
        return self._mesh.along(name)

    def positions(self, dim: int = -1) -> Tensor:
        """Where this rank's entries along a dim stand in the whole: ``[shape[dim]]``, int64."""
        dim %= len(self.shape)
        everything = torch.arange(self.whole_shape[dim])
        return self.take(everything, 0, dim)

    def cuts(self, dims: Collection[int]) -> bool:
        """Whether other ranks hold other slices of any of these dims."""
        return bool(self._over(dims))

    def mesh_dims(self, dims: Collection[int]) -> set[str]:
        """Over which mesh dims any of these are cut."""
        return {dim.name for dim in self._over(dims)}

    def ranks(self, dims: Collection[int]) -> int:
        """Over how many ranks these dims are cut."""
        return math.prod(dim.size for dim in self._over(dims))

    def count(self, dims: Collection[int]) -> int:
        """Entries along some dims of the whole tensor, multiplied."""
        return math.prod(self.whole_shape[dim] for dim in dims)

    def leads(self, dims: Collection[int]) -> bool:
        """Whether this rank is the first of those that hold other slices of these dims.

        What is to count once in a sum over them, it holds.
        """
        return all(self._mesh.coordinate(dim.name) == 0 for dim in self._over(dims))

    def summed(self, term: Tensor, dims: Collection[int], *, in_place: bool = False) -> Tensor:
        """Terms of a sum added up over the ranks that hold other slices of these dims. Collective.

        One all-reduce of ``term`` over each mesh dim that cuts one of them.
        """
        for dim in self._over(dims):
            term = all_reduce_sum(term, self._mesh.along(dim.name), in_place=in_place)
        return term

    def gathered(
        self,
        part: Tensor,
        dim: int = -1,
        of: int = -1,
        over: Collection[str] | None = None,
    ) -> Tensor:
        """Every rank's part of what belongs to a dim of the activation. Collective: inverse of
        `take`.

        Args:
            part: holds, along ``dim``, an entry for every entry of this rank's shard.
            dim: dim of ``part``.
            of: the activation's dim that it belongs to.
            over: the mesh dims to gather over; None for all.
        """
        return assemble(part, self._cut_like(of, dim % part.ndim, over), self._mesh)

    def take(
        self,
        whole: Tensor,
        dim: int = -1,
        of: int = -1,
        over: Collection[str] | None = None,
    ) -> Tensor:
        """This rank's part of a tensor that is whole: a per-channel weight, a mask.

        Args:
            whole: holds, along ``dim``, an entry for every entry of the whole activation.
            dim: dim of ``whole``.
            of: the activation's dim that it belongs to.
            over: the mesh dims that ``whole`` is not cut over yet; None for all.

        Returns:
            ``whole`` with ``dim`` cut to this rank's length; differentiable.
        """
        layout = self._cut_like(of, dim % whole.ndim, over)
        return disassemble(whole, layout, self._mesh) if layout.dims else whole

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

    def facts(self) -> dict[str, Any]:
        """All that `from_facts` needs, in numbers and strings: for a file."""
        return {
            "shape": list(self.shape),
            "dims": [
                {
                    "name": dim.name,
                    "size": dim.size,
                    "dim": _at(dim),
                    "blocks": block_count(dim.value),  # type: ignore[arg-type]
                    "shard_sizes": dim.shard_sizes,
                    "zigzag": dim.zigzag,
                }
                for dim in self._layout.dims
            ],
        }

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], mesh: ParallelMesh) -> LocalShard:
        """The same shard on the same rank, of a job that runs on as many."""
        dims = []
        for told in facts["dims"]:
            at, blocks, sizes = told["dim"], told["blocks"], told["shard_sizes"]
            cut = Shard(at) if blocks == 1 else _StridedShard(at, split_factor=blocks)
            dim = DimLayout(told["name"], told["size"], cut, cut, zigzag=told["zigzag"])
            dims.append(replace(dim, shard_sizes=tuple(sizes) if sizes is not None else None))
        return cls(facts["shape"], ActivationLayout(tuple(dims)), mesh)

    def _over(self, dims: Collection[int]) -> list[DimLayout]:
        """The mesh dims that cut any of these."""
        named = {dim % len(self.shape) for dim in dims}
        return [dim for dim in self._layout.dims if _at(dim) % len(self.shape) in named]

    def _cut_like(self, of: int, at: int, over: Collection[str] | None = None) -> ActivationLayout:
        """The cut of the activation's dim, as one of dim ``at`` of another tensor."""
        cuts = [d.on(at) for d in self._over([of]) if over is None or d.name in over]
        return ActivationLayout(tuple(cuts))


def _at(dim: DimLayout) -> int:
    if dim.value is None or not is_sharded(dim.value):
        raise RuntimeError(f"internal: {dim.name} is not cut, so no shard is local over it")
    return shard_dim(dim.value)
