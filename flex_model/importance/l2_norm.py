"""Channels by the L2 norm of their activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from flex_model.errors import ImportanceError
from flex_model.importance.activation import Activation
from flex_model.importance.checks import collected, keys_of, vector
from flex_model.importance.hook import ForwardHook
from flex_model.importance.layer import megatron_group
from flex_model.importance.sharded_sum import ShardedSum
from flex_model.layouts.sources import Side

__all__ = ["L2NormHook", "MegatronL2NormHook"]


_LEAST_PIECE = 2**18  # entries: more is done with each than in other hooks


class L2NormHook(ForwardHook):
    """Channels by ``sqrt(sum over samples of (mean over a sample's tokens of |x|)^2)``.

    Minitron's score (Muralidharan et al. 2024, eq. 2 and 3), as NVIDIA ModelOpt computes it. Any
    layer; ``[sequence, batch, channels]``, or ``[tokens, channels]`` as one sample (an expert's
    input; no token, no effect).

    Args:
        sequence_dim: 0 for ``[sequence, batch, channels]`` (Megatron, the default), 1 for
            ``[batch, sequence, channels]``.
        per_token: ``sqrt(sum over tokens of x^2)`` in place of the above, which depends on how
            tokens are packed into samples; this does not.
        side: whether the layer's "input" or its "output" is scored (norms: the output).

    Traffic per call: none; where context parallelism cuts sequences one sum of ``[batch, own
    channels]``.
    """

    def __init__(
        self,
        sequence_dim: int = 0,
        *,
        per_token: bool = False,
        side: Literal["input", "output"] = "input",
    ) -> None:
        super().__init__(sequence_dim)
        if side not in ("input", "output"):
            raise ImportanceError(f'side must be "input" or "output", got {side!r}.')
        self.per_token = per_token
        self.watches: tuple[Side, ...] = (side,)  # type: ignore[misc]
        self._squares = ShardedSum()

    @property
    def sums(self) -> Mapping[str, ShardedSum]:
        return {"activations": self._squares}

    @property
    def made_with(self) -> dict[str, Any]:
        own = {"per_token": self.per_token, "side": self.watches[0]}
        return {**super().made_with, **own}

    def see(
        self, module: nn.Module, inputs: Activation | None, outputs: Activation | None, raw: object
    ) -> None:
        seen = inputs if inputs is not None else outputs
        assert seen is not None
        if self.per_token:
            term = seen.summed(torch.square)
            self._squares.add(self.noted(term), seen.shard, seen.leading)
            return
        along, across = self._dims(module, seen)
        if seen.shard.count(seen.leading) == 0:  # an expert that no token chose
            return
        term = _sum_of_squares(seen, along) if across else _means(seen, along).square()
        self._squares.add(self.noted(term), seen.shard, across)

    def _dims(self, module: nn.Module, seen: Activation) -> tuple[int, tuple[int, ...]]:
        """The dim of a sample's tokens, and that of samples."""
        if seen.values.ndim == 2:
            return 0, ()
        if seen.values.ndim != 3:
            raise ImportanceError(
                f"{self._who(module)}: an activation {tuple(seen.values.shape)} is neither "
                "[sequence, batch, channels] nor [tokens, channels]. per_token=True takes any."
            )
        return self.sequence_dim, (1 - self.sequence_dim,)

    def _who(self, module: nn.Module) -> str:
        return f"{type(self).__name__} on {self.name or type(module).__name__}"

    def accumulate(self) -> Tensor:
        """``[channels]``, float32."""
        return collected(self._squares.whole(), type(self).__name__).sqrt()

    def to_dict(self) -> dict[str, Tensor]:
        """``score``: `accumulate`'s."""
        return {"score": self.accumulate()}

    def state_dict(self) -> dict[str, Tensor | None]:
        """``activations``: the sum of squares ``[channels]``, None before the first call."""
        return {"activations": self._squares.whole()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        keys_of(state_dict, ["activations"], type(self).__name__)
        squares = state_dict["activations"]
        if squares is not None:
            squares = vector(squares, None, "activations", type(self).__name__)
        self._squares.restore(squares)


class MegatronL2NormHook(L2NormHook):
    """`L2NormHook` over the whole hidden dimension of Megatron's tensor-parallel ranks.

    Where the hooked module does not tell how its input lies, it is taken to be cut along channels
    over Megatron's tensor-parallel group. A replicated input is not counted twice.
    """

    def _group(self) -> ProcessGroup | None:
        return megatron_group()


def _sum_of_squares(seen: Activation, along: int) -> Tensor:
    """Of the samples' means, ``[own channels]``."""
    if seen.shard.cuts((along,)):
        return _means(seen, along).square().sum(0)
    lengths = _lengths(seen, along)
    total = seen.values.new_zeros(seen.values.shape[-1], dtype=torch.float32)
    for piece, sizes in seen.magnitudes(1 - along, _LEAST_PIECE):
        sums = sizes.sum(along)
        sums = sums / lengths[piece] if isinstance(lengths, Tensor) else sums
        total += sums.square_().sum(0)
    return total if isinstance(lengths, Tensor) else total / lengths**2


def _means(seen: Activation, along: int) -> Tensor:
    """Of every sample, ``[samples, own channels]`` (or of all tokens, ``[own channels]``), where
    other ranks may hold other tokens of them.
    """
    total = seen.values.new_zeros(
        [size for dim, size in enumerate(seen.values.shape) if dim != along], dtype=torch.float32
    )
    for _, sizes in seen.magnitudes(along):
        total += sizes.sum(along)
    return seen.shard.summed(total, (along,), in_place=True) / _lengths(seen, along)


def _lengths(seen: Activation, along: int) -> Tensor | float:
    """Tokens of each sample that count: ``[samples, 1]``, or one number for all."""
    if seen.mask is None:
        return float(seen.shard.whole_shape[along])
    counts = seen.shard.summed(seen.keep.sum(along), (along,))
    return counts.clamp(min=1).unsqueeze(-1)
