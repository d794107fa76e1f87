"""Where a model can be hooked, seen in one forward of the whole model under plain torch hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flex_model.testing.case import Site

__all__ = ["Survey", "survey"]

# For a model that tells no vocabulary.
_FEW_TOKENS = 16


@dataclass(frozen=True)
class Survey:
    """What one forward showed.

    Attributes:
        sites: the hook points of every module but the root, by module name: one for each tensor of
            floats that it returns.
        others: modules without any, and why.
        embedding: the module that made floats of the ids.
        embedding_batch_dim: the dim of its output that the batch lies along.
        vocabulary: ids are drawn below this.
    """

    sites: Mapping[str, tuple[Site, ...]]
    others: Mapping[str, str]
    embedding: str
    embedding_batch_dim: int
    vocabulary: int


@dataclass
class _Seen:
    """What passed the modules' boundaries, in order of their calls."""

    sites: dict[str, tuple[Site, ...]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    embeddings: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    def call(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Note a module's call, if it is its first."""
        if name in self.sites or name in self.others:
            return
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        found = tuple(
            _site(name, index, inputs, args, output, tensor)
            for index, tensor in enumerate(outputs)
            if tensor.is_floating_point() and tensor.ndim > 0
        )
        if not found:
            self.others[name] = "it returns no tensor of floats"
            return
        self.sites[name] = found
        has_children = next(module.children(), None) is not None
        if inputs and not inputs[0].is_floating_point() and not has_children:
            self.embeddings.append((name, tuple(outputs[0].shape)))


def survey(module: nn.Module, batch: int, sequence: int, vocabulary: int | None) -> Survey:
    """Run the whole model once and note what passes each module.

    Raises:
        RuntimeError: no module makes floats of token ids.
    """
    below = vocabulary or _vocabulary(module)
    ids = torch.arange(batch * sequence).view(batch, sequence) % below
    seen = _Seen()
    names = [name for name, _ in module.named_modules() if name]
    with ExitStack() as hooked:
        for name in names:
            hook = partial(seen.call, name)
            handle = module.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
            hooked.callback(handle.remove)
        module(ids)
    if not seen.embeddings:
        raise RuntimeError("no module of the model makes floats of the token ids that it is given")
    embedding, shape = seen.embeddings[0]
    uncalled = {
        name: "no forward calls it" for name in names if name not in {*seen.sites, *seen.others}
    }
    return Survey(
        sites={name: seen.sites[name] for name in names if name in seen.sites},
        others=seen.others | uncalled,
        embedding=embedding,
        embedding_batch_dim=shape.index(batch) if batch in shape else 0,
        vocabulary=below,
    )


def _site(
    name: str, index: int, inputs: list[Tensor], args: Any, output: Any, tensor: Tensor
) -> Site:
    first = inputs[0] if inputs and inputs[0].is_floating_point() and inputs[0].ndim else None
    own = [arg for arg in args if isinstance(arg, Tensor)]
    # torch's backward hooks see the tensors of a tuple, and of positional arguments.
    returned = output if isinstance(output, tuple) else (output,)
    seen_backward = tensor.requires_grad and any(item is tensor for item in returned)
    fed_backward = bool(own) and own[0] is first and own[0].requires_grad
    return Site(
        name,
        tensor.shape[-1],
        first.shape[-1] if first is not None else None,
        index=index,
        ndim=tensor.ndim,
        input_ndim=first.ndim if first is not None else None,
        backward=seen_backward,
        keywords_only=not fed_backward,
    )


def _vocabulary(module: nn.Module) -> int:
    """As many ids as the smallest table has, for nothing tells tokens from positions."""
    return min((table.num_embeddings for table in _tables(module)), default=_FEW_TOKENS)


def _tables(module: nn.Module) -> Iterator[nn.Embedding]:
    return (child for child in module.modules() if isinstance(child, nn.Embedding))
