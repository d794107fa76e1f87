"""What an importance hook is shown in one call: this rank's shard, and which tokens count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flex_model.core.local_shard import LocalShard
from flex_model.errors import ImportanceError

__all__ = ["Activation", "PaddingMask"]

# An activation is looked at in so many pieces, but not in smaller ones than so many entries.
_PIECES, _LEAST_PIECE = 8, 2**17


@dataclass(frozen=True)
class PaddingMask:
    """Which tokens of a batch are real.

    Attributes:
        own: ``[batch, sequence]``, true for real tokens: of this rank's batch, and of its part of
            the sequence under context parallelism, as the model is given them.
        count: real tokens of the whole batch, over all ranks.
    """

    own: Tensor
    count: int


@dataclass(frozen=True)
class Activation:
    """One call's input or output of a layer on this rank.

    Attributes:
        values: ``[..., channels]``, detached.
        shard: which part of the whole tensor they are.
        mask: of padding; None where every token counts.
        sequence_dim: the dim of the tokens of one sequence, of three: 0 or 1.
    """

    values: Tensor
    shard: LocalShard
    mask: PaddingMask | None = None
    sequence_dim: int = 1

    @property
    def leading(self) -> tuple[int, ...]:
        """Every dim but the channels'."""
        return tuple(range(self.values.ndim - 1))

    @property
    def tokens(self) -> int:
        """How many tokens the whole tensor holds that count."""
        return self.mask.count if self.mask is not None else self.shard.count(self.leading)

    def summed(self, function: Callable[[Tensor], Tensor], dim: int | None = None) -> Tensor:
        """A function of every entry summed in float32, padding left out.

        Taken piece by piece, so that neither a float32 copy nor the function's result is ever as
        large as the activation.

        Args:
            function: of a piece, entry by entry; zero for zero.
            dim: the dim to sum over; None for all but the channels'.

        Returns:
            The shape of the values without the dims summed over.
        """
        values = self.values if dim is not None else self.values.flatten(0, -2)
        keep = self.keep if self.mask is not None else None
        keep = keep.flatten() if keep is not None and dim is None else keep
        dim = dim or 0
        shape = [size for at, size in enumerate(values.shape) if at != dim]
        total = values.new_zeros(shape, dtype=torch.float32)
        room = max(_LEAST_PIECE, values.numel() // _PIECES)
        size = max(1, room * values.shape[dim] // max(1, values.numel()))
        pieces = values.split(size, dim)
        masks = keep.split(size, dim) if keep is not None else (None,) * len(pieces)
        for piece, mask in zip(pieces, masks, strict=True):
            exact = piece.float() if mask is None else piece.float() * mask.unsqueeze(-1)
            total += function(exact).sum(dim)
        return total

    @property
    def keep(self) -> Tensor:
        """Ones for tokens that count and zeros for padding, float32, of the leading dims."""
        if self.mask is None:
            return self.values.new_ones(self.values.shape[:-1], dtype=torch.float32)
        own, shape = self.mask.own.to(self.values.device), self.values.shape[:-1]
        own = own.float() if self.sequence_dim == 1 else own.float().T
        if len(shape) == 1:
            own = own.flatten()
        if own.ndim == len(shape):  # sequence parallelism cuts the tokens of a layer once more
            for dim in range(own.ndim):
                if own.shape[dim] != shape[dim]:
                    own = self.shard.take(own, dim, dim, over=("tp",))
        if own.shape != shape:
            raise ImportanceError(
                f"A padding mask {tuple(self.mask.own.shape)} does not fit an activation "
                f"{tuple(self.values.shape)} with its sequence along dim {self.sequence_dim}. "
                "Give [batch, sequence] as the model's input has it."
            )
        return own
