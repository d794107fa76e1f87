"""Which rotations are asked for, and the matrix of each place."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from flex_model.compress.spinquant.hadamard import core_size, random_signs
from flex_model.compress.spinquant.orthogonal import (
    Dense,
    Hadamard,
    Rotation,
    random_orthogonal_matrix,
)
from flex_model.errors import CompressionError

__all__ = ["Choice", "Kind", "TransformType"]

Kind = Literal["R1", "R2", "R3", "R4"]
TransformType = Literal["hadamard", "random-hadamard", "random-matrix"]


@dataclass(frozen=True)
class Choice:
    """What is asked for.

    Attributes:
        rotations: R1 of the residual stream, R2 of each head's values, R3 of queries and keys, R4
            of the MLP's inner activation.
        transform_type: Hadamard's matrix, one with random signs, or any orthogonal one.
        randomize: each layer has a matrix of its own, drawn by the seed and the layer's name. With
            "hadamard", by signs.
        seed: of all that is drawn; the same on every rank.
        block_size: rotate blocks of so many features; None for all of them at once.
        precision: that weights are changed in, before they are rounded once.
        center: subtract the mean of what writes the stream; None where norms are LayerNorms.
        matrices: by rotation, in place of those that would be made: ``[size, size]``.
    """

    rotations: tuple[Kind, ...] = ("R1", "R2", "R4")
    transform_type: TransformType = "hadamard"
    randomize: bool = False
    seed: int = 0
    block_size: int | None = None
    precision: torch.dtype = torch.float64
    center: bool | None = None
    matrices: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, given, known in (
            ("rotations", self.rotations, get_args(Kind)),
            ("transform_type", (self.transform_type,), get_args(TransformType)),
            ("matrices", tuple(self.matrices), self.rotations),
        ):
            unknown = sorted({str(one) for one in given} - set(known))
            if unknown:
                raise CompressionError(
                    f"{name}: {', '.join(unknown)} is none of {', '.join(known) or 'those asked'}."
                )
        if len(set(self.rotations)) < len(self.rotations):
            raise CompressionError(f"rotations names one twice: {', '.join(self.rotations)}.")
        if not self.precision.is_floating_point:
            raise CompressionError(f"precision is a floating-point dtype, got {self.precision}.")

    def rotation(self, kind: Kind, length: int, place: str) -> Rotation:
        """The matrix of one place, of a block's size.

        Args:
            kind: which rotation.
            length: features that are rotated there.
            place: the layer's name, by which it differs where that is asked for.

        Raises:
            CompressionError: no block or matrix fits that length.
        """
        size = self.block_size or length
        if size < 1 or length % size:
            raise CompressionError(
                f"transform_block_size={size} does not divide the {length} features that {kind} "
                f"rotates ({place}). Choose one that does."
            )
        if kind in self.matrices:
            return Dense.checked(self.matrices[kind], size, kind)
        named = f"{self.seed} {kind} {place if self.randomize else ''}"
        generator = torch.Generator().manual_seed(zlib.crc32(named.encode()))  # takes 32 bits
        if self.transform_type == "random-matrix":
            return Dense(random_orthogonal_matrix(size, generator))
        core_size(size)  # raises where there is none
        signed = self.randomize or self.transform_type == "random-hadamard"
        return Hadamard(size, random_signs(size, generator) if signed else None)
