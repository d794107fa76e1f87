"""What an importance hook is shown in one call: this rank's shard, and which tokens count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flex_model.core.local_shard import LocalShard
from flex_model.errors import ImportanceError

__all__ = ["Activation", "PaddingMask"]


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

    @property
    def exact(self) -> Tensor:
        """The values in float32, padding as zeros: ``[..., channels]``."""
        values = self.values.float()
        return values if self.mask is None else values * self.keep.unsqueeze(-1)

    def norm(self, order: int, dims: tuple[int, ...]) -> Tensor:
        """The vector norm over some dims, in one pass in float32, padding left out.

        No copy of the activation is made unless there is padding.
        """
        narrow = self.mask is None and self.values.dtype != torch.float64
        values = self.values if narrow else self.exact
        return torch.linalg.vector_norm(values, order, dims, dtype=torch.float32)

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
