"""Sparsifies the inputs of layers by masks that are made while the model runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, field_validator

from flex_model.compress.event import Event, EventType
from flex_model.compress.modifier import Modifier
from flex_model.compress.modifiers.model_of import flex_model_of, layers_of
from flex_model.compress.state import State
from flex_model.core.flex_model import FlexModel
from flex_model.errors import CompressionError
from flex_model.sparsity import ActivationSparsifier

__all__ = ["SparsifyModifier"]


class SparsifyModifier(Modifier):
    """An `ActivationSparsifier` that aggregates from ``start`` to ``end``, and sparsifies from
    there until the run is over.

    With ``update`` masks are made anew at the end of every batch for which `Event.should_update`
    holds; without, once, at the end. When the run is over inputs are no longer sparsified; the
    masks are in `sparsifier` and in ``folder``.

    Attributes:
        layers: names of modules, or shell patterns.
        aggregate: of the sparsifier: a function, or its import name ``"package.module:name"``.
        reduce: the same.
        mask: the same.
        combine: the same, of data-parallel ranks; None adds them.
        features: of the sparsifier.
        feature_dim: of the sparsifier.
        config: keywords of ``mask``.
        folder: where the state is written when the run is over; None for nowhere.
    """

    layers: list[str]
    aggregate: Callable[..., Any]
    reduce: Callable[..., Any]
    mask: Callable[..., Any]
    combine: Callable[..., Any] | None = None
    features: list[int] | None = None
    feature_dim: int | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    folder: Path | None = None

    _model: FlexModel | None = PrivateAttr(default=None)
    _sparsifier: ActivationSparsifier | None = PrivateAttr(default=None)
    _names: list[str] = PrivateAttr(default_factory=list)

    @field_validator("aggregate", "reduce", "mask", "combine", mode="before")
    @classmethod
    def _imported(cls, given: Any) -> Any:
        return _function(given) if isinstance(given, str) else given

    @property
    def sparsifier(self) -> ActivationSparsifier:
        """What does the work.

        Raises:
            CompressionError: the run has not begun.
        """
        if self._sparsifier is None:
            raise CompressionError("SparsifyModifier is not initialized.")
        return self._sparsifier

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self._model = flex_model_of(state, "SparsifyModifier")
        self._names = layers_of(self._model, self.layers)
        self._sparsifier = ActivationSparsifier(
            self._model, self.aggregate, self.reduce, self.mask, self.features, self.feature_dim,
            combine_fn=self.combine, **self.config,
        )  # fmt: skip
        return True

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        for name in self._names:
            self.sparsifier.register_layer(name)
        self._adopt()

    def on_update(self, state: State, event: Event, **kwargs: Any) -> None:
        due = self.update is not None and event.should_update(self.start, self.end, self.update)
        if event.type_ is EventType.BATCH_END and due and not self.ended:
            self.sparsifier.step()

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if any("data" in group for group in self.sparsifier.data_groups.values()):
            self.sparsifier.step()
        self.sparsifier.squash_mask()
        self._adopt()

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self.started:
            self.on_start(state, event)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.on_end(state, event)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        if self.folder is not None:
            self.sparsifier.save(self.folder)
        return True

    def remove_hooks(self) -> None:
        super().remove_hooks()
        if self._sparsifier is not None:
            self._sparsifier.squash_mask(attach_sparsify_hook=False)

    def _adopt(self) -> None:
        """Own the sparsifier's hooks of the moment, in place of those it has taken off."""
        self._handles.clear()
        for hook in self.sparsifier.hooks:
            if self._model is not None:
                self.adopt_hook(self._model, hook)


def _function(name: str) -> Any:
    """What an import name in a recipe means; a recipe is the caller's program."""
    module, _, inner = name.partition(":")
    try:
        return getattr(importlib.import_module(module), inner)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r} is no function 'package.module:name' ({error})") from error
