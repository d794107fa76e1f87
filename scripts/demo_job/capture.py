"""Captures whole activations of attention and MLP, and notes what a rank itself holds of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from flex_model import FlexModel, HookFunction

__all__ = ["capture"]

SITES = tuple(
    f"model.layers.{layer}.{name}"
    for layer in (0, 3)
    for name in ("self_attn.q_proj", "self_attn", "mlp.up_proj", "mlp.act_fn", "mlp")
)


@torch.no_grad()
def capture(model: nn.Module, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """One forward's whole activations (on rank 0; elsewhere none), and this rank's local shapes."""
    records: dict[str, list[Tensor]] = {}
    with _local_shapes(model) as local_shapes, FlexModel(model, records) as flex:
        for site in SITES:
            flex.register_forward_hook(HookFunction(site))
        flex(input_ids=ids, use_cache=False)
    return {site: record[0] for site, record in records.items()}, local_shapes


@contextmanager
def _local_shapes(model: nn.Module) -> Iterator[dict[str, list[int]]]:
    """What a plain PyTorch hook sees: filled by the forwards run inside the context."""
    shapes: dict[str, list[int]] = {}

    def note(site: str, output: object) -> None:
        tensor = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        shapes[site] = list((tensor.to_local() if isinstance(tensor, DTensor) else tensor).shape)

    handles = [
        model.get_submodule(site).register_forward_hook(
            lambda _module, _inputs, output, site=site: note(site, output)
        )
        for site in SITES
    ]
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()
