"""Module names as the user wrote the model, without what wrappers put between."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp._flat_param import FlatParameter
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["module_at", "named_modules", "named_parameters", "plain_name"]

# FSDP1, activation checkpointing and torch.compile put the user's module inside one of theirs.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})


def plain_name(name: str, root: nn.Module | None = None) -> str:
    """A dotted name without the wrappers' parts.

    DDP's part is "module", which may as well be the user's: it is known by the model only. Where
    the model has something of its own by the name that is asked for, that one is meant.

    >>> plain_name("_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.mlp")
    'layers.0.mlp'
    """
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    if root is None:
        return name
    spelled = dict(_spellings(root))
    return name if name in spelled.values() else spelled.get(name, name)


def _spellings(root: nn.Module) -> Iterator[tuple[str, str]]:
    """Every module and parameter as torch names it, but for the other wrappers, and plainly."""
    over_mesh = _is_ddp_over_mesh(root)
    for with_ddp, plain, module in _walk(root):
        yield with_ddp, plain
        for own, _ in _own_parameters(module, over_mesh):
            yield _joined(with_ddp, own), _joined(plain, own)


def named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under its plain name, each name once: the user's module, not its wrapper."""
    # A wrapper comes before what it wraps.
    yield from {plain: module for _, plain, module in _walk(root)}.items()


def _walk(
    module: nn.Module, with_ddp: str = "", plain: str = ""
) -> Iterator[tuple[str, str, nn.Module]]:
    """Every module under its name, which leaves in DDP's part or leaves it out too."""
    yield with_ddp, plain, module
    for name, child in module._modules.items():
        if child is None:
            continue
        own = _layer_of_all(module, name, child)
        by_ddp = _is_ddp(module) and own == "module"
        yield from _walk(
            child,
            with_ddp if own in _WRAPPERS else _joined(with_ddp, own),
            plain if own in _WRAPPERS or by_ddp else _joined(plain, own),
        )


def _is_ddp(module: nn.Module) -> bool:
    return isinstance(module, DistributedDataParallel)


def _is_ddp_over_mesh(root: nn.Module) -> bool:
    return any(_is_ddp(module) and hasattr(module, "device_mesh") for module in root.modules())


def _layer_of_all(owner: nn.Module, own: str, child: nn.Module) -> str:
    """Megatron counts the layers of each pipeline stage from 0, and numbers them from 1 in all."""
    number = getattr(child, "layer_number", None)
    if isinstance(owner, nn.ModuleList) and isinstance(number, int):
        return str(number - 1)
    return own


def _joined(owner: str, own: str) -> str:
    return f"{owner}.{own}" if owner else own


def module_at(root: nn.Module, name: str) -> nn.Module:
    """The module of a plain name."""
    return dict(named_modules(root))[name]


def named_parameters(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under its plain name, each parameter once.

    FSDP1 may show a unit's parameters as one flat tensor. A meta tensor of the whole shape, which
    takes no gradient, then stands for each of them.
    """
    found: set[int] = set()
    over_mesh = _is_ddp_over_mesh(root)
    for _, owner, module in _walk(root):
        for own, tensor in _own_parameters(module, over_mesh):
            if id(tensor) not in found:
                found.add(id(tensor))
                yield _joined(owner, own), tensor


def _own_parameters(module: nn.Module, ddp_over_mesh: bool) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module._parameters.items():
        if isinstance(parameter, FlatParameter):
            yield from _stand_ins_of(parameter).items()
        elif parameter is not None:
            yield name, parameter
    if ddp_over_mesh:  # the first forward replaces tensor-parallel parameters by plain attributes
        for name, value in vars(module).items():
            if isinstance(value, DTensor):
                yield name, value


_stand_ins = WeakIdKeyDictionary()


def _stand_ins_of(flat: FlatParameter) -> dict[str, Tensor]:
    """The same for as long as the flat parameter lives: a parameter is known by its identity."""
    if flat not in _stand_ins:
        _stand_ins[flat] = {
            plain_name(name): torch.empty(shape, dtype=flat.dtype, device="meta")
            for name, shape in zip(flat._fqns, flat._shapes, strict=True)
        }
    return _stand_ins[flat]
