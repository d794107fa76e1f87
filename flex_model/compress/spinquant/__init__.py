"""SpinQuant: rotations of a model's weights and activations that leave its outputs as they were."""

from flex_model.compress.spinquant.hadamard import (
    fast_hadamard,
    hadamard_matrix,
    random_hadamard_matrix,
)
from flex_model.compress.spinquant.mapping import NormMapping, SpinQuantMapping, infer
from flex_model.compress.spinquant.norms import center_embeddings, fuse_norm_linears
from flex_model.compress.spinquant.orthogonal import random_orthogonal_matrix
from flex_model.compress.spinquant.rotate import Rotations, rotate

__all__ = ["SpinQuantMapping", "NormMapping", "infer", "rotate", "Rotations"]
__all__ += ["center_embeddings", "fuse_norm_linears"]
__all__ += ["hadamard_matrix", "random_hadamard_matrix", "random_orthogonal_matrix"]
__all__ += ["fast_hadamard"]
