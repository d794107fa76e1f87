"""Module names as the user wrote the model, without what wrappers put between."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

__all__ = ["module_at", "named_modules", "named_parameters", "plain_name"]

# FSDP1, activation checkpointing and torch.compile put the user's module inside one of theirs.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})


def plain_name(name: str) -> str:
    """A dotted name without the wrappers' parts.

    >>> plain_name("_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.mlp")
    'layers.0.mlp'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under its plain name, each name once: the user's module, not its wrapper."""
    found: dict[str, nn.Module] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        found[plain_name(name)] = module  # a wrapper comes before what it wraps
    yield from found.items()


def module_at(root: nn.Module, name: str) -> nn.Module:
    """The module of a plain name."""
    return dict(named_modules(root))[name]


def named_parameters(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under its plain name."""
    for name, parameter in root.named_parameters():
        yield plain_name(name), parameter
