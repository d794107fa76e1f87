"""A user's own model as a row of the grid: told in strings, so that other processes build it too.

A source is a transformers model's directory, or a factory ``package.module:function``. The factory
is called once in each process that needs the model, ``function(True)`` for the whole of it and
``function(False)`` for this rank's part, so it may set up its framework as it likes.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flex_model.errors import ConfigurationError
from flex_model.layouts.names import module_at, named_modules
from flex_model.loading.transformers_model import from_directory
from flex_model.testing.case import Case, Data, Model
from flex_model.testing.survey import Survey, survey

__all__ = ["UserCase", "load", "survey_of", "user_case"]


@dataclass(frozen=True)
class UserCase(Case):
    """A row whose largest error is the user's to choose, for deep models round more."""

    allowed: float = 1e-5

    def tolerance(self, quantity: str, *, on_shards: bool = False) -> float:
        """The same for every quantity."""
        return self.allowed


def user_case(source: str, tp: int, dp: int, found: Survey, data: Data, allowed: float) -> UserCase:
    """The row of a source, after its survey.

    Args:
        source: directory or factory.
        tp: tensor-parallel ranks.
        dp: data-parallel ranks.
        found: what the survey of the whole model showed.
        data: sizes of the batch.
        allowed: the largest relative error that passes.
    """
    return UserCase(
        source,
        tp,
        dp,
        whole=partial(_whole, source, found),
        sharded=partial(_sharded, source, tp, dp, found, data),
        sites=tuple(site for sites in found.sites.values() for site in sites),
        data=data,
        allowed=allowed,
    )


def survey_of(source: str, batch: int, sequence: int, vocabulary: int | None) -> Survey:
    """The survey of a source's whole model. A body for one rank."""
    return survey(load(source, whole=True), batch, sequence, vocabulary)


@lru_cache(maxsize=1)
def load(source: str, *, whole: bool, tp: int = 1, dp: int = 1) -> nn.Module:
    """Build a source's model in this process, in evaluation mode; once, for it is kept.

    Raises:
        ConfigurationError: no such directory or factory, or one that returns no module.
    """
    if ":" in source:
        module = _factory(source)(whole)
        if not isinstance(module, nn.Module):
            raise ConfigurationError(
                f"The factory {source} returned {type(module).__name__}, no nn.Module."
            )
    elif not (Path(source) / "config.json").is_file():
        raise ConfigurationError(
            f"There is no directory {source} with a config.json. Give a transformers model's "
            "directory, or a factory spelled package.module:function."
        )
    else:
        module = from_directory(source) if whole else from_directory(source, tp, dp)
    return module.eval()


def _factory(source: str) -> Any:
    name, _, function = source.partition(":")
    try:
        return getattr(importlib.import_module(name), function)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # of something that the factory's module needs
        raise ConfigurationError(f"There is no module {name}, of the factory {source}.") from None
    except AttributeError as error:
        if error.name != function:
            raise
        raise ConfigurationError(f"Module {name} has no function {function!r}.") from None


@contextmanager
def _whole(source: str, found: Survey) -> Iterator[Model]:
    module = load(source, whole=True)
    yield Model(
        module, _logits, found.embedding, dict, embedding_batch_dim=found.embedding_batch_dim
    )


@contextmanager
def _sharded(source: str, tp: int, dp: int, found: Survey, data: Data) -> Iterator[Model]:
    module = load(source, whole=False, tp=tp, dp=dp)
    embedding, shape = _embedded(module, found.embedding, data)
    yield Model(
        module,
        _logits,
        embedding,
        dict,  # no gradients of weights: nothing tells how a factory's lie
        dp_rank=dist.get_rank() // tp,
        embedding_batch_dim=found.embedding_batch_dim,
        embedding_part=partial(_part, shape=shape, rank=dist.get_rank() % tp, ranks=tp),
    )


_EMBEDDED: dict[nn.Module, tuple[str, tuple[int, ...]]] = {}


def _embedded(module: nn.Module, plain: str, data: Data) -> tuple[str, tuple[int, ...]]:
    """The embedding's name behind wrappers, and the shape of what it returns on this rank.

    Raises:
        ConfigurationError: the sharded model has no such module.
    """
    if module in _EMBEDDED:
        return _EMBEDDED[module]
    if plain not in dict(named_modules(module)):
        raise ConfigurationError(f"The sharded model has no {plain!r}, the whole one's embedding.")
    child, shapes = module_at(module, plain), []
    name = next(name for name, other in module.named_modules() if other is child)
    handle = child.register_forward_hook(lambda *call: shapes.append(tuple(call[-1].shape)))
    try:
        module(torch.zeros(data.batch, data.sequence, dtype=torch.int64))
    finally:
        handle.remove()
    _EMBEDDED[module] = (name, shapes[0])
    return _EMBEDDED[module]


def _part(whole: Tensor, shape: tuple[int, ...], rank: int, ranks: int) -> Tensor:
    """A tensor rank's part of the embedding's output, where each has a part of the sequence."""
    for dim, (length, own) in enumerate(zip(whole.shape, shape, strict=True)):
        if own * ranks == length and own != length:
            return whole.narrow(dim, rank * own, own).clone()
    return whole.clone()


def _logits(module: Any, ids: Tensor) -> Tensor:
    output = module(ids)
    logits = output if isinstance(output, Tensor) else output.logits
    return logits.full_tensor() if isinstance(logits, DTensor) else logits
