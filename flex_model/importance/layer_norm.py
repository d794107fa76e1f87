"""Hidden channels by the size of a norm's output."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from flex_model.errors import ImportanceError
from flex_model.importance import files
from flex_model.importance.activation import Activation
from flex_model.importance.checks import collected, keys_of, vector
from flex_model.importance.hook import ForwardHook
from flex_model.importance.sharded_sum import ShardedSum
from flex_model.layouts.sources import Side

__all__ = ["LayerNormContributionHook"]


class LayerNormContributionHook(ForwardHook):
    """Hidden channels by ``sum over calls of mean over tokens of |output|``.

    Any leading dims. Traffic per call: none, sequence-parallel norms included.

    Args:
        layernorm_layer: the norm hooked; it must have a weight.
        activation_hooks_kwargs: not read; hooks of one run are made alike.
        sequence_dim: which of two leading dims a padding mask's sequence is.

    Raises:
        ImportanceError: the layer is no norm with a weight.
    """

    watches: ClassVar[tuple[Side, ...]] = ("output",)

    def __init__(
        self,
        layernorm_layer: nn.Module,
        activation_hooks_kwargs: Mapping[str, Any] | None = None,
        *,
        sequence_dim: int = 1,
    ) -> None:
        super().__init__(sequence_dim)
        weight = getattr(layernorm_layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 1:
            raise ImportanceError(
                f"{type(layernorm_layer).__name__} is no norm with one weight per channel. Hook "
                "a LayerNorm or RMSNorm; L2NormHook(side='output') takes any layer."
            )
        self.channels = weight.numel()
        self._means = ShardedSum()

    @property
    def sums(self) -> Mapping[str, ShardedSum]:
        return {"agg_embedding_activations": self._means}

    @property
    def made_with(self) -> dict[str, Any]:
        return {**super().made_with, "channels": self.channels}

    def see(
        self, module: nn.Module, inputs: Activation | None, outputs: Activation | None, raw: object
    ) -> None:
        assert outputs is not None
        if outputs.tokens == 0:
            return
        sums = outputs.summed()
        self._means.add(self.noted(sums / outputs.tokens), outputs.shard, outputs.leading)

    def accumulate(self) -> Tensor:
        """``[hidden]``, float32."""
        return collected(self._means.whole(), type(self).__name__)

    def to_dict(self) -> dict[str, Tensor]:
        """``score``, and ``channels_importance_ascending``: the channels from the least on."""
        score = self.accumulate()
        return {"score": score, "channels_importance_ascending": score.argsort(stable=True)}

    def state_dict(self) -> dict[str, Tensor | None]:
        """``agg_embedding_activations``: ``[hidden]``, None before the first call."""
        return {name: total.whole() for name, total in self.sums.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        hook, name = type(self).__name__, "agg_embedding_activations"
        keys_of(state_dict, [name], hook)
        means = state_dict[name]
        if means is not None:
            means = vector(means, self.channels, name, hook)
        self._means.restore(means)

    @classmethod
    def dump_activations_logs(
        cls: type[ForwardHook],
        activation_hooks: Mapping[str, ForwardHook],
        activations_log_dir: str | Path,
        args: Any,
        *,
        file_format: files.Format = "safetensors",
    ) -> None:
        """Besides the scores, the ranking of hidden channels by their mean over all norms."""
        found = {module: hook.accumulate() for module, hook in activation_hooks.items()}
        results = files.results_of_norms(found, args, time.strftime("%Y_%m_%d__%H_%M_%S"))
        files.dump_scores(
            activation_hooks, activations_log_dir, args, file_format=file_format,
            extra={"channel_importance_results.json": results},
        )  # fmt: skip
