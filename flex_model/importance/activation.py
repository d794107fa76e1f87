"""What an importance hook is shown in one call: this rank's shard, and which tokens count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

    def magnitudes(self, across: int, least: int = _LEAST_PIECE) -> Iterator[tuple[slice, Tensor]]:
        """``|x|`` in float32, padding as zeros, in pieces along a dim: neither a float32 copy nor
        what is made of it is ever as large as the activation.

        Args:
            across: the dim.
            least: entries of a piece, unless the activation has fewer. Pieces that stay in a CPU's
                cache are fast, and so are few operations.

        Yields:
            Where the piece stands along the dim, and the piece, which may be written to, and which
            the next one overwrites.
        """
        length, entries = self.values.shape[across], max(1, self.values.numel())
        size = max(1, max(least, entries // _PIECES) * length // entries)
        keep = self.keep.unsqueeze(-1) if self.mask is not None else None
        room: Tensor | None = None
        for piece in (slice(at, min(at + size, length)) for at in range(0, length, size)):
            values = self.values.narrow(across, piece.start, piece.stop - piece.start)
            if room is None or room.shape != values.shape:
                room = torch.empty_like(values, dtype=torch.float32)
            if values.dtype == torch.float32:
                torch.abs(values, out=room)
            else:
                room.copy_(values).abs_()
            if keep is not None:
                room.mul_(keep.narrow(across, piece.start, piece.stop - piece.start))
            yield piece, room

    def summed(self, function: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """``|x|``, or a function of it, summed over all tokens: ``[channels]``, float32."""
        leading = self.leading
        total = self.values.new_zeros(self.values.shape[-1], dtype=torch.float32)
        longest = max(leading, key=lambda dim: self.values.shape[dim])
        for _, sizes in self.magnitudes(longest):
            total += (sizes if function is None else function(sizes)).sum(leading)
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
