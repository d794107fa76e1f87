"""Hadamard matrices, and products with them that never build them.

A matrix of size n = 2^k m is Sylvester's of 2^k, times (Kronecker) Paley's of the smallest m that
there is one for; m = 1 where n is a power of 2. The power of 2 comes outermost, so that the
matrix over 2^j ranks is one of the ranks times one on each (QuaRot, Ashkboos et al. 2024, sec. 4).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from flex_model.errors import CompressionError

__all__ = ["core_size", "fast_hadamard", "hadamard_matrix", "random_hadamard_matrix"]

# Of how many entries one pass over memory takes sums: 4 of the 2-point butterflies at once. On a
# CPU this is two to five times as fast as one at a time, and as many matrix units take on a GPU.
_RADIX = 16


def hadamard_matrix(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The Hadamard matrix divided by sqrt(size), so that it is orthogonal: ``[size, size]``.

    Sylvester's where the size is a power of 2, which is symmetric too.

    Raises:
        CompressionError: none of this size is known here.
    """
    core = core_size(size)
    return _signs(size // core, core, dtype) / math.sqrt(size)


def random_hadamard_matrix(
    size: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``diag(s) H`` with random signs s (QuaRot's randomised Hadamard): ``[size, size]``.

    Raises:
        CompressionError: none of this size is known here.
    """
    return random_signs(size, generator).to(dtype)[:, None] * hadamard_matrix(size, dtype)


def random_signs(size: int, generator: torch.Generator | None = None) -> Tensor:
    """Ones and minus ones, ``[size]``, float64."""
    return torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1


def fast_hadamard(x: Tensor, transpose: bool = False) -> Tensor:
    """``x @ hadamard_matrix(n)`` along the last dim, in O(n log n) where n is a power of 2.

    Elsewhere the power of 2 in n is transformed so, and the rest (12, 20, 28, ...) by one product
    with that small matrix.

    Args:
        x: ``[..., n]``, floating point, of any layout.
        transpose: multiply with the matrix transposed, its inverse.

    Raises:
        CompressionError: there is no matrix of this size.
    """
    size = x.shape[-1]
    core = core_size(size)
    left, inner, y = size // core, core, x
    if core > 1:
        matrix = _signs(1, core, x.dtype, x.device)
        y = y.reshape(-1, core) @ (matrix.T if transpose else matrix)
    while left > 1:
        radix = min(_RADIX, left)
        factor = _signs(radix, 1, x.dtype, x.device)
        y = y.reshape(-1, radix) @ factor if inner == 1 else factor @ y.reshape(-1, radix, inner)
        left, inner = left // radix, inner * radix
    return y.reshape(x.shape) / math.sqrt(size)


@lru_cache(maxsize=256)
def core_size(size: int) -> int:
    """The m of n = 2^k m: 1 for powers of 2, else what Paley's matrix is of.

    Raises:
        CompressionError: none of this size is known here.
    """
    powers = size & -size if size > 0 else 0
    core = size // powers if powers else 0
    if core == 1:
        return 1
    while core and core <= size:
        if core % 4 == 0 and _paley_prime(core) is not None:
            return core
        core *= 2
    raise CompressionError(
        f"No Hadamard matrix of size {size} is known here: sizes are 1, 2, or 2^k m with m = p + 1 "
        "or 2 (p + 1) of a prime p (Paley). Set transform_block_size to a power of 2 that divides "
        f'{size}, or transform_type to "random-matrix".'
    )


@lru_cache(maxsize=32)
def _signs(power: int, core: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Ones and minus ones, ``[power * core] * 2``; kept, for every forward asks for the same."""
    matrix = torch.ones(1, 1, dtype=torch.float64) if core == 1 else _paley(core)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(power.bit_length() - 1):
        matrix = torch.kron(two, matrix)
    return matrix.to(device, dtype)


def _paley_prime(size: int) -> int | None:
    """The prime of Paley's first construction (p + 1, p = 3 mod 4), or else of his second."""
    if _is_prime(size - 1):
        return size - 1
    second = size // 2 - 1
    return second if second % 4 == 1 and _is_prime(second) else None


def _paley(size: int) -> Tensor:
    """Paley's matrix: ``[size, size]``, float64 (Paley, On Orthogonal Matrices, 1933)."""
    prime = _paley_prime(size)
    if prime is None:
        raise CompressionError(f"Paley has no matrix of size {size}.")
    squares = torch.full((prime,), -1.0, dtype=torch.float64)
    squares[torch.arange(1, prime) ** 2 % prime] = 1.0
    squares[0] = 0.0
    numbers = torch.arange(prime)
    bordered = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    bordered[0, 1:] = 1.0
    bordered[1:, 0] = -1.0 if size == prime + 1 else 1.0
    bordered[1:, 1:] = squares[(numbers[:, None] - numbers) % prime]
    eye = torch.eye(prime + 1, dtype=torch.float64)
    if size == prime + 1:
        return bordered + eye
    ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(bordered, ones) + torch.kron(eye, diagonal)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % k for k in range(2, math.isqrt(number) + 1))
