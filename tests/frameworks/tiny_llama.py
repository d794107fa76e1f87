"""A Llama of two layers whose linear layers and embedding are whatever a framework makes.

The first layer has two key-value heads, which two ranks share out; the second has one, which is
fewer than the ranks, so each of them holds it whole and uses it for its own query heads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flex_model.testing.case import Model, Site, only
from frameworks.values import Cut, fill, gather_grads

HIDDEN = 24
HEADS = 4
HEAD_DIM = 8
KV_HEADS = (2, 1)
INNER = 40
VOCABULARY = 34

# Cut over tensor ranks; and held whole by each of them but used for its own query heads only, so
# that the gradients on the ranks are terms of a sum.
CUTS = {"tok_embeddings.weight": Cut(0), "output.weight": Cut(0)}
SHARED = set()
for _layer, _kv_heads in enumerate(KV_HEADS):
    for _name in ("attention.wq", "feed_forward.w1", "feed_forward.w3"):
        CUTS[f"layers.{_layer}.{_name}.weight"] = Cut(0)
    for _name in ("attention.wo", "feed_forward.w2"):
        CUTS[f"layers.{_layer}.{_name}.weight"] = Cut(1)
    _kv = {f"layers.{_layer}.attention.{_name}.weight" for _name in ("wk", "wv")}
    if _kv_heads > 1:
        CUTS |= dict.fromkeys(_kv, Cut(0))
    else:
        SHARED |= _kv

SITES = (
    Site("tok_embeddings", HIDDEN),
    # Of the whole batch, [sequence, width]: rolled along the sequence.
    Site("rotary", HEAD_DIM, ndim=2, backward=False, hard="rotary"),
    Site("rotary", HEAD_DIM, index=1, ndim=2, backward=False, hard="rotary"),
    Site("layers.0", HIDDEN, HIDDEN),
    Site("layers.0.attention", HIDDEN, HIDDEN),
    Site("layers.0.attention.wk", KV_HEADS[0] * HEAD_DIM, HIDDEN),
    Site("layers.1.attention.wk", KV_HEADS[1] * HEAD_DIM, HIDDEN, hard="kv heads < ranks"),
    Site("layers.1.attention.wo", HIDDEN, HEADS * HEAD_DIM),
    Site("layers.1.attention_norm", HIDDEN, HIDDEN),
    Site("layers.0.feed_forward.w3", INNER, HIDDEN),
    Site("layers.1.feed_forward.act", INNER, INNER, hard="between shards"),
    Site("output", VOCABULARY, HIDDEN),
)

# One of each kind, where four ranks share the machine.
FEW_SITES = only(
    SITES,
    "tok_embeddings",
    "rotary",
    "layers.0",
    "layers.1.attention.wk",
    "layers.1.attention.wo",
    "layers.1.feed_forward.act",
)


def _linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=False)


def _unchanged(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Layers:
    """What a framework puts in the place of plain layers.

    ``shared`` is what it does to the input of projections that every rank holds whole but uses for
    its own heads only: the gradients that come back are terms of a sum.
    """

    column: Callable[[int, int], nn.Module] = _linear
    row: Callable[[int, int], nn.Module] = _linear
    head: Callable[[int, int], nn.Module] = _linear
    embedding: Callable[[int, int], nn.Module] = nn.Embedding
    shared: Callable[[Tensor], Tensor] = field(default=_unchanged)


class Rotary(nn.Module):
    """Cosines and sines of every position, ``[sequence, head_dim]`` each."""

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = 100.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.outer(positions.float(), frequencies).repeat(1, 2)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on ``[batch, heads, sequence, head_dim]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, layers: Layers, kv_heads: int) -> None:
        super().__init__()
        kv = layers.column if kv_heads > 1 else _linear
        self.shared = layers.shared if kv_heads == 1 else _unchanged
        self.wq = layers.column(HIDDEN, HEADS * HEAD_DIM)
        self.wk = kv(HIDDEN, kv_heads * HEAD_DIM)
        self.wv = kv(HIDDEN, kv_heads * HEAD_DIM)
        self.wo = layers.row(HEADS * HEAD_DIM, HIDDEN)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shared = self.shared(x)
        query, key, value = (_heads(y) for y in (self.wq(x), self.wk(shared), self.wv(shared)))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        groups = query.shape[1] // key.shape[1]
        key, value = (y.repeat_interleave(groups, dim=1) for y in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))


def _heads(y: Tensor) -> Tensor:
    return y.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.w1 = layers.column(HIDDEN, INNER)
        self.w3 = layers.column(HIDDEN, INNER)
        self.act = nn.SiLU()
        self.w2 = layers.row(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, layers: Layers, kv_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.attention = Attention(layers, kv_heads)
        self.ffn_norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.feed_forward = FeedForward(layers)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class TinyLlama(nn.Module):
    def __init__(self, layers: Layers | None = None) -> None:
        super().__init__()
        layers = layers or Layers()
        self.tok_embeddings = layers.embedding(VOCABULARY, HIDDEN)
        self.rotary = Rotary()
        self.layers = nn.ModuleList(Block(layers, kv_heads) for kv_heads in KV_HEADS)
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.output = layers.head(HIDDEN, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_embeddings(ids)
        cos, sin = self.rotary(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.output(self.norm(x))


def logits(module: nn.Module, ids: Tensor) -> Tensor:
    return module(ids)


def filled() -> TinyLlama:
    """The model in plain torch, with its values."""
    module = TinyLlama()
    fill(module, {})
    return module


@contextmanager
def whole() -> Iterator[Model]:
    """The one-process model."""
    module = filled()
    yield Model(module, logits, "tok_embeddings", lambda: gather_grads(module, {}))
