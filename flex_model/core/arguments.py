"""Whether what a caller gives can be meant: refused at once, where the caller stands."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup, Store
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Placement
from torch.jit import ScriptModule, TopLevelTracedModule

from flex_model.errors import ConfigurationError, HintError, RegistrationError

__all__ = ["check_hookable", "check_options", "check_request", "check_wrapped"]
__all__ += ["checked_placements", "whole_sizes"]

_GIVEN = "(current_module, inputs, save_ctx, modules)"


def whole_sizes(hint: Any, name: Any) -> tuple[int | None, ...]:
    """An ``expected_shape`` as a tuple.

    Raises:
        HintError: it holds something else than sizes and None.
    """
    try:
        sizes = tuple(None if size is None else operator.index(size) for size in hint)
        fits = not any(isinstance(size, bool) or (size or 0) < 0 for size in hint)
    except TypeError:
        fits = False
    if not fits:
        raise HintError(
            f"{name}: expected_shape={hint!r} is no sequence of sizes. Give the whole tensor's "
            "size of every dim, and None where it is to be filled in."
        )
    return sizes


def checked_placements(hints: Any, option: str, name: Any) -> dict[str, Placement]:
    """Placements by mesh dim.

    Raises:
        HintError: no mapping, or something else than placements in it.
    """
    if isinstance(hints, Mapping) and all(isinstance(p, Placement) for p in hints.values()):
        return dict(hints)
    raise HintError(
        f"{name}: {option}={hints!r} is no mapping of mesh dims to torch's placements. Give, for "
        'instance, {"tp": Shard(2)}.'
    )


def check_request(name: Any, function: Any, index: Any) -> None:
    """What a HookFunction asks for.

    Raises:
        RegistrationError: a name, a function or an index that can be none.
    """
    if not isinstance(name, str):
        raise RegistrationError(
            f"A hook function's module_name must be a string, got {name!r}. Give the module's path "
            "as named_modules() spells it."
        )
    if isinstance(index, bool) or not isinstance(index, int):
        raise RegistrationError(
            f"{name}: unpack_idx must be a whole number, got {index!r}. It counts the tensors of "
            "the module's output or input, from 0, or from -1 back."
        )
    if function is None:
        return
    if not callable(function):
        raise RegistrationError(
            f"{name}: editing_function must be callable, got {type(function).__name__}. Give a "
            f"function of {_GIVEN}, or None to retrieve only."
        )
    _check_signature(name, function)


def _check_signature(name: str, function: Callable[..., Any]) -> None:
    try:
        taken = signature(function)
    except (TypeError, ValueError):  # built in C
        return
    told = {"shard": None} if "shard" in taken.parameters else {}
    try:
        taken.bind(None, None, None, None, **told)
    except TypeError as error:
        spelled = getattr(function, "__name__", repr(function))
        raise RegistrationError(
            f"{name}: editing function {spelled}{taken} cannot be called with {_GIVEN}: {error}."
        ) from None


def check_hookable(where: str, module: nn.Module) -> None:
    """Refuse a module that runs no Python hooks.

    Raises:
        RegistrationError: it is TorchScript's.
    """
    # torch.jit.trace leaves hooks to the outermost module, torch.jit.script to none.
    if isinstance(module, ScriptModule) and not isinstance(module, TopLevelTracedModule):
        raise RegistrationError(
            f"{where} cannot be hooked: it is TorchScript, which runs without Python hooks. Wrap "
            "the model that was given to torch.jit."
        )


def check_wrapped(module: Any, output_ptr: Any) -> None:
    """What a FlexModel wraps, and where its records go.

    Raises:
        ConfigurationError: no module, or no dict.
    """
    if not isinstance(module, nn.Module):
        raise ConfigurationError(f"FlexModel wraps an nn.Module, got {type(module).__name__}.")
    if not isinstance(output_ptr, dict):
        raise ConfigurationError(
            f"output_ptr must be the dict that records go to, got {type(output_ptr).__name__}."
        )


def check_options(
    *,
    data_parallel_loss: Any,
    context_order: Any,
    seed: Any,
    batch_dim: Any,
    sequence_dim: Any,
    patience: Any,
    mesh: Any,
    process_group: Any,
    store: Any,
) -> None:
    """A FlexModel's options.

    Raises:
        ConfigurationError: naming the one that cannot be.
    """
    if data_parallel_loss not in ("mean", "sum"):
        raise ConfigurationError(
            f'data_parallel_loss must be "mean" or "sum", got {data_parallel_loss!r}.'
        )
    if context_order not in ("zigzag", "contiguous"):
        raise ConfigurationError(
            f'context_order must be "zigzag" or "contiguous", got {context_order!r}.'
        )
    for name, value, least in (
        ("seed", seed, None),
        ("batch_dim", batch_dim, 0),
        ("sequence_dim", sequence_dim, 0),
    ):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or (least is not None and value < least):
            least_too = f", {least} or more" if least is not None else ""
            raise ConfigurationError(f"{name} must be a whole number{least_too}, got {value!r}.")
    number = isinstance(patience, (int, float)) and not isinstance(patience, bool)
    if not number or not patience > 0:
        raise ConfigurationError(f"patience must be a number of seconds above 0, got {patience!r}.")
    for name, value, due in (
        ("mesh", mesh, DeviceMesh),
        ("process_group", process_group, ProcessGroup),
        ("store", store, Store),
    ):
        if value is not None and not isinstance(value, due):
            raise ConfigurationError(
                f"{name} must be a torch.distributed {due.__name__} or None, got "
                f"{type(value).__name__}."
            )
