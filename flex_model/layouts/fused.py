"""Which features of a projection are its queries, keys, values, gate or up, and whose head.

Models fuse projections in orders of their own: ``[q | k | v]``, ``[gate | up]``, or for every group
of heads its queries, key and value together. Orders are those of one process; how the ranks cut
them is the layout's affair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flex_model.errors import RegistrationError
from flex_model.layouts.names import module_at

__all__ = ["Features", "chosen_features", "features_of"]


@dataclass(frozen=True)
class Features:
    """The last dim of an activation: so many groups, each of the same parts one after another.

    Attributes:
        parts: name and width of each part within one group.
        groups: how often they come.
        head_dim: features of one attention head; None where there are none.
    """

    parts: tuple[tuple[str, int], ...]
    groups: int = 1
    head_dim: int | None = None

    @property
    def width(self) -> int:
        """Length of the whole dim."""
        return self.groups * sum(width for _, width in self.parts)

    def select(self, part: str | None, head: int | None) -> Tensor:
        """Positions of a part's features, or of one of its heads', in order: ``[n]``, int64.

        Raises:
            ValueError: there is no such part or head; says which there are.
        """
        names = [name for name, _ in self.parts]
        if part is None and len(names) > 1:
            raise ValueError(f"name the part that head {head} is of: {names}")
        if part is not None and part not in names:
            raise ValueError(f"there is no part {part!r}, but {names}")
        at = names.index(part) if part is not None else 0
        grouped = torch.arange(self.width).view(self.groups, -1)
        begin = sum(width for _, width in self.parts[:at])
        chosen = grouped[:, begin : begin + self.parts[at][1]].flatten()
        if head is None:
            return chosen
        if self.head_dim is None:
            raise ValueError("it has no attention heads")
        heads = chosen.view(-1, self.head_dim)
        if not -len(heads) <= head < len(heads):
            raise ValueError(f"there is no head {head}, but {len(heads)}")
        return heads[head]


def chosen_features(
    root: nn.Module, name: str, side: str, part: str | None, head: int | None
) -> tuple[Tensor, int]:
    """Positions of a part (or one head) along the last dim, and that dim's whole length.

    Raises:
        RegistrationError: nothing tells the parts, or there is none such.
    """
    features = features_of(root, name, side)
    try:
        return features.select(part, head), features.width
    except ValueError as error:
        raise RegistrationError(
            f"{name} ({side}), part={part!r}, head={head!r}: {error}."
        ) from None


def features_of(root: nn.Module, name: str, side: str) -> Features:
    """How the features at a module's boundary are put together.

    Args:
        root: the wrapped model.
        name: plain path of the module.
        side: "input" or "output".

    Raises:
        RegistrationError: nothing tells it.
    """
    leaf = name.rpartition(".")[2]
    shape = _shape_around(root, name)
    rule = _RULES.get((leaf, side))
    if rule is None or (shape is None and leaf not in _GATED):
        known = sorted({leaf for leaf, _ in _RULES})
        raise RegistrationError(
            f"{name} ({side}): nothing tells where its parts and heads lie. Known are modules "
            f"named {', '.join(known)} with head counts in a config or attributes around them. "
            "Hook the whole activation, and take the part in the editing function."
        )
    return rule(shape, module_at(root, name))


@dataclass(frozen=True)
class _Heads:
    """Head counts of an attention layer, in the whole model."""

    queries: int
    keys: int
    dim: int


def _shape_around(root: nn.Module, name: str) -> _Heads | None:
    """From the nearest module above that tells: a config, or attributes as hand-written layers."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        owner = module_at(root, path)
        found = _from_config(getattr(owner, "config", None)) or _from_attributes(owner)
        if found is not None:
            return found
    return None


def _from_config(config: Any) -> _Heads | None:
    queries = _first(config, "num_attention_heads", "n_head", "n_heads")
    hidden = _first(config, "hidden_size", "n_embd", "dim")
    if queries is None or hidden is None:
        return None
    keys = _first(config, "num_query_groups", "num_key_value_heads", "n_kv_heads") or queries
    return _Heads(queries, keys, _first(config, "kv_channels", "head_dim") or hidden // queries)


def _from_attributes(module: nn.Module) -> _Heads | None:
    queries, dim = _first(module, "n_heads", "num_heads"), _first(module, "head_dim")
    if queries is None or dim is None:
        return None
    return _Heads(queries, _first(module, "n_kv_heads", "num_key_value_heads") or queries, dim)


def _first(holder: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(holder, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


Rule = Callable[[Any, nn.Module], Features]


def _queries(heads: _Heads, module: nn.Module) -> Features:
    return Features((("q", heads.queries * heads.dim),), head_dim=heads.dim)


def _keys(heads: _Heads, module: nn.Module) -> Features:
    return Features((("k", heads.keys * heads.dim),), head_dim=heads.dim)


def _values(heads: _Heads, module: nn.Module) -> Features:
    return Features((("v", heads.keys * heads.dim),), head_dim=heads.dim)


def _one_after_the_other(heads: _Heads, module: nn.Module) -> Features:
    """``[q | k | v]``."""
    q, k = heads.queries * heads.dim, heads.keys * heads.dim
    return Features((("q", q), ("k", k), ("v", k)), head_dim=heads.dim)


def _by_group(heads: _Heads, module: nn.Module) -> Features:
    """For every key-value head the queries that share it, the key, the value."""
    shared = heads.queries // heads.keys * heads.dim
    parts = (("q", shared), ("k", heads.dim), ("v", heads.dim))
    return Features(parts, heads.keys, heads.dim)


def _gate_and_up(heads: _Heads | None, module: nn.Module) -> Features:
    """``[gate | up]``; the whole width is the module's own."""
    width = _first(module, "output_size", "out_features")
    if width is None:
        raise RegistrationError(f"{type(module).__name__} does not tell its output's width.")
    return Features((("gate", width // 2), ("up", width // 2)))


_GATED = frozenset({"gate_up_proj", "linear_fc1"})

# By the names that the frameworks' models use: the layout is a convention of their code.
_RULES: dict[tuple[str, str], Rule] = {
    ("linear_qkv", "output"): _by_group,
    ("query_key_value", "output"): _by_group,
    ("qkv_proj", "output"): _one_after_the_other,
    ("c_attn", "output"): _one_after_the_other,
    ("gate_up_proj", "output"): _gate_and_up,
    ("linear_fc1", "output"): _gate_and_up,
    **{(leaf, "output"): _queries for leaf in ("q_proj", "wq", "core_attention")},
    **{(leaf, "output"): _keys for leaf in ("k_proj", "wk")},
    **{(leaf, "output"): _values for leaf in ("v_proj", "wv")},
    **{(leaf, "input"): _queries for leaf in ("o_proj", "wo", "linear_proj", "c_proj")},
}
