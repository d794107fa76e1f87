"""Scores channels, heads or layers while the model runs."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from flex_model import importance
from flex_model.compress.event import Event
from flex_model.compress.modifier import Modifier
from flex_model.compress.modifiers.model_of import flex_model_of, layers_of
from flex_model.compress.state import State
from flex_model.core.flex_model import FlexModel
from flex_model.errors import CompressionError
from flex_model.importance import ForwardHook, Heads, dump_scores
from flex_model.layouts.names import module_at

__all__ = ["ScoreModifier"]


class ScoreModifier(Modifier):
    """An importance hook on each of some layers, from ``start`` to ``end`` or for a calibration.

    When it ends the hooks are off, and the scores are in `scores` and in ``folder``.

    Attributes:
        layers: names of modules, or shell patterns (``"*.down_proj"``).
        hook: a class of `flex_model.importance`, by name.
        arguments: keywords of the class; the layer itself is given where it takes one.
        folder: where scores are written; None for nowhere.
    """

    layers: list[str]
    hook: str = "L2NormHook"
    arguments: dict[str, Any] = Field(default_factory=dict)
    folder: Path | None = None

    _model: FlexModel | None = PrivateAttr(default=None)
    _scoring: dict[str, ForwardHook] = PrivateAttr(default_factory=dict)
    _scores: dict[str, dict[str, Tensor]] = PrivateAttr(default_factory=dict)

    @property
    def scores(self) -> dict[str, dict[str, Tensor]]:
        """Every layer's scores; empty before the end."""
        return self._scores

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        kind = getattr(importance, self.hook, None)
        if not (isinstance(kind, type) and issubclass(kind, ForwardHook)):
            raise CompressionError(f"flex_model.importance has no hook {self.hook!r}.")
        model = self._model = flex_model_of(state, "ScoreModifier")
        self._scores = {}
        self._scoring = {
            name: self._made(kind, module_at(model.module, name))
            for name in layers_of(model, self.layers)
        }
        return True

    def on_start(self, state: State, event: Event, **kwargs: Any) -> None:
        for name, hook in self._scoring.items():
            for kind, function in hook.hook_functions(name):
                self.register_flex_hook(self._flex, function, kind)

    def on_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._collect()

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self.started:
            self.on_start(state, event)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._collect()

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        if self.started and not self.ended:
            self._collect()
        return True

    @property
    def _flex(self) -> FlexModel:
        if self._model is None:
            raise CompressionError("ScoreModifier is not initialized.")
        return self._model

    def _collect(self) -> None:
        self._scores = {name: hook.to_dict() for name, hook in self._scoring.items()}
        self.remove_hooks()
        if self.folder is not None:
            dump_scores(self._scoring, self.folder, {"hook": self.hook, "layers": self.layers})

    def _made(self, kind: Any, layer: nn.Module) -> ForwardHook:
        arguments = dict(self.arguments)
        if isinstance(arguments.get("heads"), dict):
            arguments["heads"] = Heads(**arguments["heads"])
        takes_layer = {"linear_layer", "layernorm_layer", "experts"} & {*signature(kind).parameters}
        made: ForwardHook = kind(layer, **arguments) if takes_layer else kind(**arguments)
        return made
