"""Sparsity of activations: aggregate what a layer is given, make a mask of it, sparsify by it."""

from flex_model.sparsity.sparsifier import ActivationSparsifier

__all__ = ["ActivationSparsifier"]
