"""The tiny Llama with its sequence cut over context-parallel ranks, as Megatron cuts it.

The sequence has twice as many chunks as there are ranks, and rank r holds chunks r and 2C-1-r: so
each rank has as many pairs of a query and a key before it as any other. Keys and values are
gathered over the ranks for each attention; all else is done on a rank's own positions.

A rank's loss is the mean over its own tokens, and the model's is the mean of the ranks', as over
data-parallel ranks. The whole model is the same one on a group of one rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from flex_model.testing.case import Case, Data, Model, Site, only
from frameworks import tiny_llama
from frameworks.tiny_llama import HEAD_DIM, KV_HEADS, Attention, Layers, Rotary, TinyLlama, rotate
from frameworks.values import fill, gather_grads

# Four chunks of five positions: no length of a part is a size of the model or of the batch.
DATA = Data(sequence=20)

# The sequence lies along dim 1, but along dim 2 of keys and values. What the gathering returns is
# whole on every rank, with gradients that are terms of a sum. Values are hooked and keys are not:
# what an edit adds to all keys alike changes no attention, so its gradient is nothing but rounding.
SITES = (
    Site("rotary", HEAD_DIM, backward=False, hard="rotary"),
    Site("rotary", HEAD_DIM, index=1, backward=False, hard="rotary"),
    Site("layers.0.attention.gather", HEAD_DIM, HEAD_DIM, ndim=4, hard="between shards"),
    Site("layers.1.attention.gather", HEAD_DIM, HEAD_DIM, ndim=4, hard="between shards"),
    *(site for site in tiny_llama.SITES if site.name != "rotary"),
)


def part_of(whole: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    """A rank's part of what lies along the whole sequence in ``dim``."""
    chunks = whole.chunk(2 * ranks, dim)
    return torch.cat([chunks[number] for number in _chunks_of(rank, ranks)], dim)


def whole_of(parts: list[Tensor], dim: int) -> Tensor:
    """The whole sequence from every rank's part, in the order of positions."""
    chunks: dict[int, Tensor] = {}
    for rank, part in enumerate(parts):
        chunks |= zip(_chunks_of(rank, len(parts)), part.chunk(2, dim), strict=True)
    return torch.cat([chunks[number] for number in sorted(chunks)], dim)


def _chunks_of(rank: int, ranks: int) -> tuple[int, int]:
    """The two chunks that a rank holds, in the order in which it holds them."""
    return rank, 2 * ranks - 1 - rank


class _Gather(torch.autograd.Function):
    """The whole sequence on every rank; each part gets the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part, group=group)
        return whole_of(parts, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return part_of(gradient, ctx.dim, ctx.group.rank(), ctx.group.size()), None, None


class GatherSequence(nn.Module):
    """Values and keys, ``[batch, heads, sequence, head_dim]`` each: a rank's in, the whole out.

    What comes out is the same on every rank, but its gradients are terms of a sum: each rank only
    brings what its own queries make of them.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, value: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return _Gather.apply(value, 2, self.group), _Gather.apply(key, 2, self.group)


class BatchRotary(Rotary):
    """Cosines and sines of the positions ``[batch, sequence]``, ``[batch, sequence, head_dim]``."""

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = super().forward(positions.flatten())
        return cos.view(*positions.shape, HEAD_DIM), sin.view(*positions.shape, HEAD_DIM)


class ContextAttention(Attention):
    """Queries of a rank's own positions on the keys and values of the whole sequence."""

    def __init__(self, kv_heads: int, group: dist.ProcessGroup) -> None:
        super().__init__(Layers(), kv_heads)
        self.gather = GatherSequence(group)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = (_heads(linear(x)) for linear in (self.wq, self.wk, self.wv))
        cos, sin = cos[:, None], sin[:, None]
        value, key = self.gather(value, rotate(key, cos, sin))
        groups = query.shape[1] // key.shape[1]
        key, value = (y.repeat_interleave(groups, dim=1) for y in (key, value))
        query = rotate(query, cos, sin)
        mixed = F.scaled_dot_product_attention(query, key, value, self._seen(key.shape[2]))
        return self.wo(mixed.transpose(1, 2).flatten(2))

    def _seen(self, sequence: int) -> Tensor:
        """Which keys each of the rank's own positions sees, ``[own, sequence]``."""
        positions = torch.arange(sequence)
        group = self.gather.group
        return positions <= part_of(positions, 0, group.rank(), group.size())[:, None]


def _heads(y: Tensor) -> Tensor:
    return y.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


class ContextLlama(TinyLlama):
    """Takes a rank's part of the tokens and their positions, ``[batch, sequence]`` both."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.rotary = BatchRotary()
        for layer, kv_heads in zip(self.layers, KV_HEADS, strict=True):
            layer.attention = ContextAttention(kv_heads, group)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.tok_embeddings(ids)
        cos, sin = self.rotary(positions)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.output(self.norm(x))


def _logits(module: Any, ids: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Logits of the whole sequence on every rank, from each rank's call with its own part.

    Every rank then takes the mean loss over all tokens, the same one. Its gradients are summed on
    the way back, so a rank's part gets the gradient of the mean over its own tokens.
    """
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    own = (part_of(x, 1, group.rank(), group.size()) for x in (ids, positions))
    return _Gather.apply(module(*own), 1, group)


@contextmanager
def build(cp: int, dp: int = 1) -> Iterator[Model]:
    """This rank's replica, over a mesh of (dp, cp)."""
    mesh = init_device_mesh("cpu", (dp, cp), mesh_dim_names=("dp", "cp"))
    group = mesh.get_group("cp")
    module = ContextLlama(group)
    fill(module, {})
    yield Model(
        module,
        partial(_logits, group=group),
        "tok_embeddings",
        lambda: gather_grads(module, {}, dp_group=dist.group.WORLD),
        dp_rank=mesh.get_local_rank("dp"),
        # The gradient of the mean over a rank's own tokens.
        embedding_part=lambda x: part_of(x, 1, group.rank(), cp) * cp,
        cp=cp,
    )


_FEW = only(SITES, "rotary", "layers.1.attention.gather", "layers.0", "output")

CASES = (
    Case("context", 1, 1, partial(build, 1), partial(build, 2), SITES, DATA, cp=2),
    Case("context x dp", 1, 2, partial(build, 1), partial(build, 2, 2), _FEW, DATA, cp=2),
)
