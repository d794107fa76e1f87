"""Placements with the whole and local tensors that they mean, for tests of routing.

Shards are cut and joined here by ``narrow`` and ``cat`` alone, so that nothing of the library under
test has a part in what is called right. Every function takes the mesh as it is; all ranks make the
same whole tensors.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

from flex_model.distributed.gradients import GradientMemory
from flex_model.distributed.mesh import ParallelMesh
from flex_model.distributed.routing import gather, reshard
from flex_model.layouts.layout import ActivationLayout, DimLayout


@dataclass(frozen=True)
class Way:
    """How one tensor lies over one mesh dim."""

    dim: str
    value: Placement
    gradient: Placement
    sizes: tuple[int, ...] | None = None
    gradient_scale: float = 1.0

    @property
    def zigzag(self) -> bool:
        """Context-parallel ranks hold two chunks each."""
        return self.dim == "cp"

    def layout(self, mesh: ParallelMesh) -> DimLayout:
        size = mesh.size(self.dim)
        return DimLayout(
            self.dim,
            size,
            self.value,
            self.gradient,
            self.sizes,
            gradient_scale=self.gradient_scale,
            zigzag=self.zigzag,
        )


def is_cut(placement: Placement) -> bool:
    """Whether a rank holds a slice only; torch's strided shard calls itself no shard."""
    return isinstance(placement, (Shard, _StridedShard))


def cut(whole: Tensor, placement: Placement, sizes: tuple[int, ...], rank: int) -> Tensor:
    """A rank's part along one mesh dim."""
    if not is_cut(placement):
        return whole
    blocks = whole.chunk(getattr(placement, "split_factor", 1), placement.dim)
    start = sum(sizes[:rank])
    return torch.cat([b.narrow(placement.dim, start, sizes[rank]) for b in blocks], placement.dim)


def cut_in_zigzag(whole: Tensor, placement: Placement, size: int, rank: int) -> Tensor:
    """The rank's chunk from the front, and the one as far from the back, of each block."""
    if not is_cut(placement):
        return whole
    parts = []
    for block in whole.chunk(getattr(placement, "split_factor", 1), placement.dim):
        chunks = block.tensor_split(2 * size, placement.dim)
        parts += [chunks[rank], chunks[-1 - rank]]
    return torch.cat(parts, placement.dim)


@dataclass
class Case:
    """A whole tensor, its ways over the mesh dims (outermost first), and the parts they mean."""

    whole: Tensor
    ways: tuple[Way, ...]
    mesh: ParallelMesh
    memory: GradientMemory = field(default_factory=lambda: GradientMemory("a test"))

    @property
    def layout(self) -> ActivationLayout:
        return ActivationLayout(tuple(way.layout(self.mesh) for way in self.ways))

    def part(self, whole: Tensor, of: str = "value") -> Tensor:
        """This rank's part of a value, or of a gradient."""
        for way in self.ways:
            placement: Placement = getattr(way, of)
            size, rank = self.mesh.size(way.dim), self.mesh.coordinate(way.dim)
            if is_cut(placement) and way.zigzag:
                whole = cut_in_zigzag(whole, placement, size, rank)
            elif is_cut(placement):
                blocks = getattr(placement, "split_factor", 1)
                even = (whole.shape[placement.dim] // blocks // size,) * size
                whole = cut(whole, placement, way.sizes or even, rank)
            elif isinstance(placement, Partial):
                whole = _term(whole, placement, rank, size)
            if of == "gradient":
                whole = whole / way.gradient_scale if way.gradient_scale != 1 else whole
        return whole.clone(memory_format=torch.contiguous_format)

    def gather(self, local: Tensor) -> Tensor:
        return gather(local, self.layout, self.mesh, self.memory)

    def reshard(self, whole: Tensor) -> Tensor:
        return reshard(whole, self.layout, self.mesh, self.memory)


def _term(whole: Tensor, placement: Partial, rank: int, size: int) -> Tensor:
    """Terms that look nothing like the whole and come to it."""
    noise = values(tuple(whole.shape), whole.dtype, seed=99)
    if placement.reduce_op == "avg":
        return whole + noise * (2 * rank - size + 1)
    return noise * (rank + 1) if rank < size - 1 else whole - noise * sum(range(1, size))


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """The same on every rank; whole numbers, so sums are exact in any order and dtype."""
    generator = torch.Generator().manual_seed(seed + 31 * math.prod(shape))
    drawn = torch.randint(-8, 9, shape, generator=generator)
    if dtype.is_complex:
        return torch.complex(drawn.double(), drawn.flip(0).double() + 1).to(dtype)
    return drawn > 0 if dtype == torch.bool else drawn.to(dtype)


def sharded_cases(mesh: ParallelMesh, count: int, dtype: torch.dtype) -> Iterator[Case]:
    """Random shapes, dims, blocks and uneven sizes over the mesh's dims."""
    generator = torch.Generator().manual_seed(count)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for number in range(count):
        shape = [draw(1, 4) for _ in range(draw(1, 4))]
        ways: list[Way] = []
        dims = [draw(0, len(shape) - 1) for _ in mesh.names]
        for name, at in reversed(list(zip(mesh.names, dims, strict=True))):
            blocks, size, own = draw(1, 3), mesh.size(name), shape[at]
            # What two mesh dims cut comes in multiples of what the inner one made, if that is even.
            uneven = draw(0, 1) == 1 and (name == mesh.names[0] or dims.count(at) == 1)
            if name == "cp":
                uneven, own = False, 2 * own
            sizes = tuple(own * draw(0, 2) for _ in range(size)) if uneven else (own,) * size
            if sum(sizes) == 0:
                sizes = (own, *sizes[1:])
            shape[at] = sum(sizes) * blocks
            placement = Shard(at) if blocks == 1 else _StridedShard(at, split_factor=blocks)
            ways.append(Way(name, placement, placement, sizes if uneven else None))
        yield Case(values(tuple(shape), dtype, seed=number), tuple(reversed(ways)), mesh)


def rows(mesh: ParallelMesh) -> Iterator[Case]:
    """Every row of the routing table, on each mesh dim alone and on all of them together."""
    table = [
        (Shard(1), Shard(1)),
        (_StridedShard(0, split_factor=2), _StridedShard(0, split_factor=2)),
        (Replicate(), Replicate()),
        (Replicate(), Partial()),
        (Partial(), Replicate()),
    ]
    whole = values((8, 8, 3), seed=5)
    for name in mesh.names:
        for value, gradient in table:
            others = {other: (Replicate(), Replicate()) for other in mesh.names}
            ways = {**others, name: (value, gradient)}
            yield Case(whole, tuple(Way(n, v, g) for n, (v, g) in ways.items()), mesh)
    if len(mesh.names) == 2:
        outer, inner = mesh.names
        for a in table:
            for b in table:
                if any(isinstance(p, _StridedShard) for p in (*a, *b)):
                    continue
                yield Case(whole, (Way(outer, *a), Way(inner, *b)), mesh)


class Collectives(TorchDispatchMode):
    """Names of the collectives that ran inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def summed_over_ranks(value: Tensor) -> Tensor:
    """A number's sum over all ranks, outside autograd."""
    total = value.detach().clone()
    dist.all_reduce(total)
    return total
