"""Channels by what each contributes by itself: its weights' norm times its mean activation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flex_model.errors import ImportanceError
from flex_model.importance.activation import Activation
from flex_model.importance.checks import collected, keys_of, vector
from flex_model.importance.hook import ForwardHook
from flex_model.importance.layer import channels_of, weight_of, whole_channels
from flex_model.importance.sharded_sum import ShardedSum

__all__ = ["IndependentChannelContributionHook"]

_RELATIVE = 1e-5
_ROWS = 64  # of a weight are taken to float32 at once


class IndependentChannelContributionHook(ForwardHook):
    """Channel c by ``||W[:, c]|| * sum over calls of mean over tokens of |x_c|``.

    Any leading dims: ``[.., channels]``, in either order of batch and sequence. Traffic per call:
    none.

    Args:
        linear_layer: the layer hooked: ``nn.Linear``, Megatron's or fairscale's
            ``RowParallelLinear``, or one with DTensor weights.
        sequence_dim: which of two leading dims a padding mask's sequence is.

    Raises:
        ImportanceError: no linear layer.
    """

    def __init__(self, linear_layer: nn.Module, *, sequence_dim: int = 1) -> None:
        super().__init__(sequence_dim)
        self.channels = channels_of(linear_layer)
        self._layer = linear_layer
        self._means = ShardedSum()
        # Taken at the first call: under FSDP only a forward has the whole weight.
        self._norms = ShardedSum()

    @property
    def sums(self) -> Mapping[str, ShardedSum]:
        return {"agg_channel_activations": self._means, "weight_norm": self._norms}

    @property
    def made_with(self) -> dict[str, Any]:
        return {**super().made_with, "channels": self.channels}

    def see(
        self, module: nn.Module, inputs: Activation | None, outputs: Activation | None, raw: object
    ) -> None:
        assert inputs is not None
        if inputs.values.ndim < 2:
            raise ImportanceError(
                f"{type(self).__name__}: an activation {tuple(inputs.values.shape)} has no tokens. "
                "Give [tokens, channels] or more dims."
            )
        if self._norms.empty:
            whole_channels(self._layer, inputs.values.shape[-1])
            norms = column_norms(weight_of(self._layer))
            self._norms.add(norms, inputs.shard, ())
        if inputs.tokens == 0:
            return
        sums = inputs.summed()
        self._means.add(self.noted(sums / inputs.tokens), inputs.shard, inputs.leading)

    def accumulate(self) -> Tensor:
        """``[channels]``, float32."""
        return self.to_dict()["score"]

    def to_dict(self) -> dict[str, Tensor]:
        """``score``, and its factors ``weight_norm`` and ``agg_channel_activations``."""
        means = collected(self._means.whole(), type(self).__name__)
        norms = collected(self._norms.whole(), type(self).__name__)
        return {
            "score": norms * means,
            "weight_norm": norms,
            "agg_channel_activations": means,
        }

    def state_dict(self) -> dict[str, Tensor | None]:
        """``agg_channel_activations`` and ``weight_norm``, ``[channels]`` each; None before the
        first call.
        """
        return {name: total.whole() for name, total in self.sums.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `state_dict`; refuses one made with other weights."""
        hook = type(self).__name__
        keys_of(state_dict, self.sums, hook)
        given = {
            name: vector(state_dict[name], self.channels, name, hook)
            if state_dict[name] is not None
            else None
            for name in self.sums
        }
        norms = given["weight_norm"]
        if norms is not None:
            self._check_weight(norms)
        self._means.restore(given["agg_channel_activations"])
        self._norms.restore(norms)

    def _check_weight(self, norms: Tensor) -> None:
        here = self._norms.whole()
        if here is None and weight_of(self._layer).shape[1] == self.channels:
            here = column_norms(weight_of(self._layer))
        if here is not None and not torch.allclose(norms.to(here.device), here, rtol=_RELATIVE):
            raise ImportanceError(
                f"{type(self).__name__}: weight_norm mismatch during state loading: the state was "
                "made with other weights of this layer. Load the model that it belongs to."
            )


def column_norms(weight: Tensor) -> Tensor:
    """The norm of every input channel's weights, ``[channels]``, float32."""
    squares = [rows.float().square().sum(0) for rows in weight.split(_ROWS)]
    return torch.stack(squares).sum(0).sqrt()
