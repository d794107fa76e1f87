"""Orthogonal maps of a tensor's last dim, fast where their matrix is Hadamard's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from flex_model.compress.spinquant.hadamard import fast_hadamard
from flex_model.errors import CompressionError

__all__ = ["Dense", "Hadamard", "Rotation", "random_orthogonal_matrix"]

_TOLERANCE = 1e-6


def random_orthogonal_matrix(
    size: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Drawn evenly from all orthogonal matrices: ``[size, size]``.

    By QR of a Gaussian matrix, with the signs that make the factor unique (Mezzadri 2007).
    """
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).to(dtype)


class Rotation(Protocol):
    """An orthogonal matrix R of ``size``."""

    @property
    def size(self) -> int: ...

    def apply(self, x: Tensor) -> Tensor:
        """``x R``, ``[..., size]``."""

    @property
    def inverse(self) -> Rotation:
        """R^T."""

    def matrix(self) -> Tensor:
        """R, ``[size, size]``, float64."""


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix of no structure.

    Attributes:
        values: ``[size, size]``, float64.
    """

    values: Tensor
    _converted: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    @classmethod
    def checked(cls, values: Tensor, size: int, name: str) -> Dense:
        """A matrix of a caller's.

        Raises:
            CompressionError: it is not square of this size, or not orthogonal.
        """
        if not isinstance(values, Tensor) or tuple(values.shape) != (size, size):
            told = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise CompressionError(f"{name} needs a matrix [{size}, {size}], got {told}.")
        matrix = values.detach().double().cpu()
        eye = torch.eye(size, dtype=torch.float64)
        away = float((matrix.T @ matrix - eye).abs().max())
        if not away <= _TOLERANCE:
            raise CompressionError(
                f"The matrix for {name} is not orthogonal: R^T R differs from 1 by {away:.2g}, so "
                "the model would compute something else. Give a matrix such as "
                "random_orthogonal_matrix() returns."
            )
        return cls(matrix)

    @property
    def size(self) -> int:
        return len(self.values)

    def apply(self, x: Tensor) -> Tensor:
        if self.values.requires_grad:
            return x @ self.values.to(x)
        key = (x.dtype, x.device)
        if key not in self._converted:  # every forward asks for the same
            self._converted[key] = self.values.to(x)
        return x @ self._converted[key]

    @property
    def inverse(self) -> Dense:
        return Dense(self.values.T)

    def matrix(self) -> Tensor:
        return self.values


@dataclass(frozen=True, eq=False)
class Hadamard:
    """``diag(signs) H``, or its inverse ``H^T diag(signs)``.

    Attributes:
        size: of H.
        signs: ``[size]``, or None for ones.
        backwards: whether it is the inverse.
    """

    size: int
    signs: Tensor | None = None
    backwards: bool = False

    def apply(self, x: Tensor) -> Tensor:
        if not self.backwards:
            return fast_hadamard(x if self.signs is None else x * self.signs.to(x))
        y = fast_hadamard(x, transpose=True)
        return y if self.signs is None else y * self.signs.to(x)

    @property
    def inverse(self) -> Hadamard:
        return Hadamard(self.size, self.signs, not self.backwards)

    def matrix(self) -> Tensor:
        return self.apply(torch.eye(self.size, dtype=torch.float64))
