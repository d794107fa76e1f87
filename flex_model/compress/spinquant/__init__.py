"""SpinQuant: rotations of a model's weights and activations that leave its outputs as they were."""

from flex_model.compress.spinquant.hadamard import (
    fast_hadamard,
    hadamard_matrix,
    random_hadamard_matrix,
)
from flex_model.compress.spinquant.learn import learn, next_token_loss
from flex_model.compress.spinquant.mapping import NormMapping, SpinQuantMapping, infer
from flex_model.compress.spinquant.modifier import SpinQuantModifier
from flex_model.compress.spinquant.norms import center_embeddings, fuse_norm_linears
from flex_model.compress.spinquant.orthogonal import random_orthogonal_matrix
from flex_model.compress.spinquant.rotate import Rotations, rotate

__all__ = ["SpinQuantModifier", "SpinQuantMapping", "NormMapping", "infer"]
__all__ += ["rotate", "Rotations", "learn", "next_token_loss"]
__all__ += ["center_embeddings", "fuse_norm_linears"]
__all__ += ["hadamard_matrix", "random_hadamard_matrix", "random_orthogonal_matrix"]
__all__ += ["fast_hadamard"]
