"""Matrices, and the fast transform against the dense product."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flex_model.compress.spinquant import (
    fast_hadamard,
    hadamard_matrix,
    random_hadamard_matrix,
    random_orthogonal_matrix,
)
from flex_model.compress.spinquant.orthogonal import Hadamard
from flex_model.errors import CompressionError

SIZES = [1, 2, 8, 64, 512, 12, 20, 24, 28, 36, 40, 76, 108, 148, 896, 1536]
EXACT = 1e-12


def _eye(size: int) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
def test_hadamard_matrices(size: int) -> None:
    """Catches a matrix that is not orthogonal, or has other entries than two."""
    matrix = hadamard_matrix(size)
    assert torch.allclose(matrix @ matrix.T, _eye(size), rtol=0, atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))


def test_powers_of_two_are_sylvesters() -> None:
    """Catches another order of rows: the golden cases' weights depend on it."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(16)] for i in range(16)]
    assert torch.equal(hadamard_matrix(16) * 4, torch.tensor(signs, dtype=torch.float64))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transpose", [False, True])
def test_fast_is_dense(size: int, transpose: bool) -> None:
    """Catches factors in another order, the transposed core, and a wrong gradient."""
    matrix = hadamard_matrix(size)
    x = torch.randn(2, 3, size, dtype=torch.float64).transpose(0, 1).requires_grad_()
    y = fast_hadamard(x, transpose)
    due = matrix.T if transpose else matrix
    assert torch.allclose(y, x @ due, rtol=0, atol=EXACT)
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    assert torch.allclose(gradient, weights @ due.T, rtol=0, atol=EXACT)


class _Products(TorchDispatchMode):
    """The longest inner dim of any matrix product."""

    longest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket.__name__ in ("mm", "bmm"):
            self.longest = max(self.longest, args[0].shape[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("size", "longest"), [(4096, 16), (3072, 16), (14336, 28)])
def test_no_dense_product(size: int, longest: int) -> None:
    """Catches a product with the whole matrix."""
    with _Products() as seen:
        fast_hadamard(torch.ones(2, size))
    assert 0 < seen.longest <= longest


@pytest.mark.parametrize("size", [0, -4, 3, 6, 10, 18])
def test_sizes_without_a_matrix(size: int) -> None:
    with pytest.raises(CompressionError, match="No Hadamard matrix of size"):
        hadamard_matrix(size)


@pytest.mark.parametrize("make", [random_hadamard_matrix, random_orthogonal_matrix])
def test_random_matrices(make) -> None:  # type: ignore[no-untyped-def]
    """Catches a matrix that is not orthogonal, not drawn, or not by the seed."""
    one, same, other = (make(24, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.allclose(one @ one.T, _eye(24), rtol=0, atol=EXACT)
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_inverse() -> None:
    """Catches signs on the wrong side of a matrix that is not symmetric."""
    rotation = Hadamard(12, torch.arange(12) % 2 * 2.0 - 1)
    assert torch.allclose(rotation.inverse.matrix(), rotation.matrix().T, rtol=0, atol=EXACT)
    assert torch.allclose(rotation.matrix(), rotation.signs[:, None] * hadamard_matrix(12))
