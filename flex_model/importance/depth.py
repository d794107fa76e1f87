"""Layers by how much they change what passes through them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flex_model.errors import ImportanceError
from flex_model.importance.activation import Activation
from flex_model.importance.checks import collected, keys_of, vector
from flex_model.importance.hook import ForwardHook
from flex_model.importance.sharded_sum import ShardedSum
from flex_model.layouts.sources import Side

__all__ = ["LayerSimilarityHook"]


class LayerSimilarityHook(ForwardHook):
    """A layer by ``sum over calls of 1 - mean over tokens of cosine(input, output)``.

    On a whole transformer layer, ``[.., .., hidden]`` in and out; the lowest score is the layer to
    drop first ("block influence", Men et al. 2024, eq. 1). Traffic per call: none.
    """

    watches: ClassVar[tuple[Side, ...]] = ("input", "output")

    def __init__(self, sequence_dim: int = 1) -> None:
        super().__init__(sequence_dim)
        self._changes = ShardedSum()

    @property
    def sums(self) -> Mapping[str, ShardedSum]:
        return {"change": self._changes}

    def see(
        self, module: nn.Module, inputs: Activation | None, outputs: Activation | None, raw: object
    ) -> None:
        assert inputs is not None
        assert outputs is not None
        before, after = inputs.values, outputs.values
        if before.shape != after.shape or outputs.shard.cuts((-1,)):
            raise ImportanceError(
                f"{type(self).__name__} on {self.name or type(module).__name__}: input "
                f"{tuple(before.shape)} and output {tuple(after.shape)} are not one residual "
                "stream. Hook a whole transformer layer."
            )
        if outputs.tokens == 0:
            return
        changes = (1.0 - F.cosine_similarity(before.float(), after.float(), dim=-1)) * outputs.keep
        term = (changes.sum() / outputs.tokens).view(1)
        self._changes.add(self.noted(term), outputs.shard, outputs.leading)

    def accumulate(self) -> Tensor:
        """The layer's score, ``[1]``, float32."""
        return collected(self._changes.whole(), type(self).__name__)

    def to_dict(self) -> dict[str, Tensor]:
        """``score``: `accumulate`'s."""
        return {"score": self.accumulate()}

    def state_dict(self) -> dict[str, Tensor | None]:
        """``change``: ``[1]``, None before the first call."""
        return {"change": self._changes.whole()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        keys_of(state_dict, ["change"], type(self).__name__)
        change = state_dict["change"]
        if change is not None:
            change = vector(change, 1, "change", type(self).__name__)
        self._changes.restore(change)


def layer_scores(hooks: Mapping[str, LayerSimilarityHook]) -> Tensor:
    """The scores of a model's layers, ``[layers]``, in the order of the mapping. Collective."""
    return torch.cat([hook.accumulate() for hook in hooks.values()])
