"""Attention heads: key-value groups by what they contribute, query heads within their groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flex_model.errors import ImportanceError
from flex_model.importance.activation import Activation
from flex_model.importance.checks import collected, keys_of, vector
from flex_model.importance.hook import ForwardHook
from flex_model.importance.l2_norm import L2NormHook
from flex_model.importance.layer import channels_of, weight_of, whole_channels
from flex_model.importance.sharded_sum import ShardedSum

__all__ = ["AttentionHeadHook", "Heads", "IndependentKvHeadContributionHook"]

_TOKENS_AT_ONCE = 512


@dataclass(frozen=True)
class Heads:
    """How the input of an output projection is made of heads.

    Attributes:
        query: query heads.
        key_value: key-value heads, each shared by a group of neighbouring query heads.
        width: channels of a head.
    """

    query: int
    key_value: int
    width: int

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ImportanceError: query heads do not divide into groups.
        """
        if min(self.query, self.key_value, self.width) < 1 or self.query % self.key_value:
            raise ImportanceError(
                f"{self.query} query heads of width {self.width} do not divide into "
                f"{self.key_value} key-value groups."
            )

    @property
    def group(self) -> int:
        """Channels of one key-value head's query heads."""
        return self.width * (self.query // self.key_value)

    @classmethod
    def of(cls, config: Any, key_value: int | None = None) -> Heads:
        """Read off a transformers-like config; ``head_dim`` may be missing or None.

        Args:
            config: has ``hidden_size``, ``num_attention_heads`` and perhaps ``head_dim`` and
                ``num_key_value_heads``.
            key_value: key-value heads, in place of the config's.
        """
        query = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // query
        if key_value is None:
            key_value = getattr(config, "num_key_value_heads", None) or query
        return cls(query, key_value, width)

    def check(self, layer: nn.Module) -> None:
        """Refuse a projection of another width.

        Raises:
            ImportanceError: its input is not these heads'.
        """
        if channels_of(layer) != self.query * self.width:
            raise ImportanceError(
                f"{type(layer).__name__} has {channels_of(layer)} input channels, but "
                f"{self.query} heads of width {self.width} make {self.query * self.width}. Hook "
                "the attention's output projection, with its own model's config."
            )


class IndependentKvHeadContributionHook(ForwardHook):
    """Key-value head k by ``sum over calls of mean over tokens of ||X_k W_k^T||``.

    X_k are the channels of its group of query heads in the output projection's input, W_k their
    columns; the bias is not counted. Any leading dims. Traffic per call: none where every rank
    holds whole groups; else (fewer key-value heads than ranks) one sum of ``[tokens, output]`` per
    group.

    Args:
        linear_layer: the output projection.
        activation_hooks_kwargs: ``model`` (its ``config`` tells heads), ``block_config`` (its
            ``attention.num_key_value_heads``), and ``optimize_for``: "memory" takes one group at a
            time, "latency" all at once.
        sequence_dim: which of two leading dims a padding mask's sequence is.

    Raises:
        ImportanceError: heads that do not divide, or another layer.
    """

    def __init__(
        self,
        linear_layer: nn.Module,
        activation_hooks_kwargs: Mapping[str, Any],
        *,
        sequence_dim: int = 1,
    ) -> None:
        super().__init__(sequence_dim)
        try:
            config = activation_hooks_kwargs["model"].config
            attention = activation_hooks_kwargs["block_config"].attention
        except (KeyError, TypeError, AttributeError) as error:
            raise ImportanceError(
                "activation_hooks_kwargs needs model (with a config) and block_config (with "
                f"attention.num_key_value_heads): {error!r}."
            ) from None
        self.optimize_for = activation_hooks_kwargs.get("optimize_for") or "memory"
        if self.optimize_for not in ("memory", "latency"):
            raise ImportanceError(
                f'optimize_for must be "memory" or "latency", got {self.optimize_for!r}.'
            )
        self.heads = Heads.of(config, attention.num_key_value_heads)
        self.heads.check(linear_layer)
        self._layer = linear_layer
        self._norms = ShardedSum()

    @property
    def sums(self) -> Mapping[str, ShardedSum]:
        return {"agg_kv_head_contributions": self._norms}

    @property
    def made_with(self) -> dict[str, Any]:
        own = {"heads": asdict(self.heads), "optimize_for": self.optimize_for}
        return {**super().made_with, **own}

    def see(
        self, module: nn.Module, inputs: Activation | None, outputs: Activation | None, raw: object
    ) -> None:
        assert inputs is not None
        own, group = inputs.values.shape[-1], self.heads.group
        whole_channels(self._layer, own)
        if inputs.tokens == 0:
            return
        norms = self._of_cut_groups(inputs) if own % group else self._of_whole_groups(inputs)
        # A group's number stands at each of its channels, wherever the ranks cut them.
        self._norms.add(self.noted(norms), inputs.shard, inputs.leading)

    def _of_whole_groups(self, inputs: Activation) -> Tensor:
        """Means of this rank's tokens over all, ``[own channels]``."""
        own, group = inputs.values.shape[-1], self.heads.group
        values, keep = inputs.values.reshape(-1, own // group, group), inputs.keep.flatten()
        weight = weight_of(self._layer).unflatten(1, (-1, group))
        total = values.new_zeros(own // group, dtype=torch.float32)
        for rows, real in zip(values.split(_TOKENS_AT_ONCE), keep.split(_TOKENS_AT_ONCE),
                              strict=True):  # fmt: skip
            total += real @ self._contributions(rows.float(), weight)
        return (total / inputs.tokens).repeat_interleave(group)

    def _contributions(self, values: Tensor, weight: Tensor) -> Tensor:
        """The norm of every group's part of the output: ``[tokens, groups]``."""
        if self.optimize_for == "latency":
            parts = torch.einsum("ngc,ogc->ngo", values, weight.float())
            return torch.linalg.vector_norm(parts, 2, 2)
        norms = [
            torch.linalg.vector_norm(values[:, k] @ weight[:, k].float().T, 2, 1)
            for k in range(values.shape[1])
        ]
        return torch.stack(norms, 1)

    def _of_cut_groups(self, inputs: Activation) -> Tensor:
        """A group whose channels several ranks hold: its part of the output is their sum."""
        values, keep = inputs.values.flatten(0, -2).float(), inputs.keep.flatten()
        weight, owner = weight_of(self._layer).float(), inputs.shard.positions(-1)
        owner = (owner // self.heads.group).to(values.device)
        means = values.new_zeros(self.heads.key_value)
        for k in range(self.heads.key_value):
            part = values[:, owner == k] @ weight[:, owner == k].T
            part = inputs.shard.summed(part, (-1,), in_place=True)
            means[k] = keep @ torch.linalg.vector_norm(part, 2, 1) / inputs.tokens
        return means[owner]

    def accumulate(self) -> Tensor:
        """``[key-value heads]``, float32."""
        total = collected(self._norms.whole(), type(self).__name__)
        return total[:: self.heads.group].clone()

    def to_dict(self) -> dict[str, Tensor]:
        """``score``: `accumulate`'s."""
        return {"score": self.accumulate()}

    def state_dict(self) -> dict[str, Tensor | None]:
        """``agg_kv_head_contributions``: ``[key-value heads]``, None before the first call."""
        return {"agg_kv_head_contributions": None if self._norms.empty else self.accumulate()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        hook, name = type(self).__name__, "agg_kv_head_contributions"
        keys_of(state_dict, [name], hook)
        total = state_dict[name]
        if total is not None:
            total = vector(total, self.heads.key_value, name, hook)
        self._norms.restore(
            total.repeat_interleave(self.heads.group) if total is not None else None
        )


class AttentionHeadHook(L2NormHook):
    """Query head h by the norm of `L2NormHook`'s scores of its channels.

    On the attention's output projection. Minitron ranks heads within each key-value group, so that
    groups stay whole: see `to_dict`.

    Args:
        linear_layer: the output projection.
        heads: how its input is made of heads.
        sequence_dim: see `L2NormHook`.
        per_token: see `L2NormHook`.
    """

    def __init__(
        self,
        linear_layer: nn.Module,
        heads: Heads,
        sequence_dim: int = 0,
        *,
        per_token: bool = False,
    ) -> None:
        super().__init__(sequence_dim, per_token=per_token)
        heads.check(linear_layer)
        self.heads = heads

    @property
    def made_with(self) -> dict[str, Any]:
        return {**super().made_with, "heads": asdict(self.heads)}

    def accumulate(self) -> Tensor:
        """``[query heads]``, float32."""
        channels = super().accumulate()
        return torch.linalg.vector_norm(channels.view(self.heads.query, self.heads.width), 2, 1)

    def to_dict(self) -> dict[str, Tensor]:
        """``score``, and ``heads_importance_ascending`` ``[key-value heads, group]``: of each group
        the query heads (counted over all groups) from the least on.
        """
        score = self.accumulate()
        grouped = score.view(self.heads.key_value, -1)
        first = torch.arange(0, self.heads.query, grouped.shape[1], device=score.device)
        ascending = grouped.argsort(dim=1, stable=True) + first.unsqueeze(1)
        return {"score": score, "heads_importance_ascending": ascending}
