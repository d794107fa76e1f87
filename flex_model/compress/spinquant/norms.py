"""What norms compute, and taking their factors into the layers behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flex_model.compress.spinquant.sharded import local_of
from flex_model.errors import CompressionError

__all__ = ["NormKind", "as_rms_norm", "center_embeddings", "fuse_norm_linears", "norm_kind"]


@dataclass(frozen=True)
class NormKind:
    """What a norm does with its weight.

    Attributes:
        kind: by the root mean square alone, or by mean and variance (with a bias).
        offset: is added to the weight: 1 in Gemma's.
    """

    kind: Literal["rms", "layer"]
    offset: float = 0.0


_ADDS_ONE = "zero_centered_gamma"  # Transformer Engine's word for Gemma's way
_BY_CLASS = {
    "RMSNorm": NormKind("rms"),
    "LlamaRMSNorm": NormKind("rms"),
    "MistralRMSNorm": NormKind("rms"),
    "Qwen2RMSNorm": NormKind("rms"),
    "Qwen3RMSNorm": NormKind("rms"),
    "GemmaRMSNorm": NormKind("rms", 1.0),
    "LayerNorm": NormKind("layer"),
}


def norm_kind(norm: nn.Module, name: str) -> NormKind:
    """By the class of a norm, or of one that it derives from.

    Raises:
        CompressionError: it is none that is known.
    """
    for base in type(norm).__mro__:
        if base.__name__ in _BY_CLASS:
            found = _BY_CLASS[base.__name__]
            return replace(found, offset=1.0) if getattr(norm, _ADDS_ONE, False) else found
    raise CompressionError(
        f"{name} is a {type(norm).__name__}; known norms are {', '.join(sorted(_BY_CLASS))}."
    )


@torch.no_grad()
def fuse_norm_linears(norm: Any, linears: Sequence[Any]) -> None:
    """``W <- W diag(gamma)``, then ``gamma <- 1`` (Gemma's, which adds 1: 0), on whole weights.

    Of a LayerNorm also ``b <- b + W beta``, then ``beta <- 0``. In float64, rounded once.

    Args:
        norm: one of the classes known.
        linears: that read what it returns, each ``[out, in]``.

    Raises:
        CompressionError: the norm is not known, a layer is listed twice, or has no bias to hold
            the norm's.
    """
    kind = norm_kind(norm, "norm")
    if len({id(linear) for linear in linears}) < len(linears):
        raise CompressionError("A layer is listed twice: it would be scaled twice.")
    gamma, beta = norm.weight.double() + kind.offset, getattr(norm, "bias", None)
    if beta is not None and any(linear.bias is None for linear in linears):
        raise CompressionError("The norm has a bias, but a layer behind it has none to hold it.")
    for linear in linears:
        if beta is not None:
            linear.bias.copy_(linear.bias.double() + linear.weight.double() @ beta.double())
        linear.weight.copy_(linear.weight.double() * gamma)
    norm.weight.fill_(1.0 - kind.offset)
    if beta is not None:
        beta.zero_()


@torch.no_grad()
def center_embeddings(embedding: Any) -> None:
    """Each row ``[hidden]`` minus its mean, in float64, rounded once.

    Exact before a LayerNorm only: an RMSNorm keeps the mean, so logits change.
    """
    weight = local_of(embedding.weight)
    values = weight.double()
    weight.copy_(values - values.mean(-1, keepdim=True))


def as_rms_norm(norm: Any) -> nn.RMSNorm:
    """What a LayerNorm without factors computes of centred values (QuaRot, sec. 4).

    ``(x - mean) / sqrt(var + eps)`` is ``x / sqrt(mean(x^2) + eps)`` where the mean is 0.
    """
    weight: Tensor = norm.weight
    shape = tuple(norm.normalized_shape)
    fused = nn.RMSNorm(shape, eps=float(norm.eps), device=weight.device, dtype=weight.dtype)
    fused.weight.__dict__.update(weight.__dict__)  # such as Megatron's mark of sequence parallelism
    return fused.train(norm.training)
