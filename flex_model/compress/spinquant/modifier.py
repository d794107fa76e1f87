"""SpinQuant as a step of a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor, nn

from flex_model.compress.modifier import Modifier
from flex_model.compress.spinquant.choice import Kind, TransformType
from flex_model.compress.spinquant.learn import learn
from flex_model.compress.spinquant.mapping import NormMapping, SpinQuantMapping
from flex_model.compress.spinquant.rotate import Rotations, rotate
from flex_model.compress.state import State
from flex_model.core.flex_model import FlexModel
from flex_model.errors import CompressionError

__all__ = ["SpinQuantModifier"]


class SpinQuantModifier(Modifier):
    """Rotates a model when it is initialized; see `rotate` and `learn` for what the fields mean.

    A step of a recipe, or used by itself: ``initialize(model)``, ``finalize()``, ``undo()``. The
    model stays rotated, and its online hooks stay, when the run is over.

    Attributes:
        rotations: any of R1, R2, R3 and R4.
        transform_type: the kind of matrix.
        randomize: a matrix for each layer.
        learnable: whether R1 and R2 are trained on the calibration batches.
        precision: that weights are rotated in.
        transform_block_size: of the matrices; None for whole dims.
        mappings: modules by part; None to infer them.
        norm_mappings: norms and their readers; None to infer them.
        transform_config: matrices of one's own, by rotation.
        center_embeddings: None where centring is exact (LayerNorms).
        seed: of what is drawn.
        learning_steps: of Adam, where learnable.
        learning_rate: likewise.
        learning_bits: of the rounded weights whose loss is lowered.
    """

    rotations: tuple[Kind, ...] = ("R1", "R2")
    transform_type: TransformType = "hadamard"
    randomize: bool = False
    learnable: bool = False
    precision: torch.dtype = torch.float64
    transform_block_size: int | None = Field(default=None, gt=0)
    mappings: SpinQuantMapping | None = None
    norm_mappings: tuple[NormMapping, ...] | None = None
    transform_config: dict[Kind, Tensor] | None = None
    center_embeddings: bool | None = None
    seed: int = 0
    learning_steps: int = 100
    learning_rate: float = 1e-2
    learning_bits: int = 4

    _rotated: Rotations | None = PrivateAttr(default=None)

    @field_validator("rotations", mode="before")
    @classmethod
    def _in_capitals(cls, value: Any) -> Any:
        one_by_one = isinstance(value, (list, tuple))
        return tuple(str(one).upper() for one in value) if one_by_one else value

    @field_validator("precision", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """As a recipe spells it: "float32"."""
        found = getattr(torch, value, None) if isinstance(value, str) else value
        return found if isinstance(found, torch.dtype) else value

    @property
    def rotated(self) -> Rotations:
        """What was done.

        Raises:
            CompressionError: nothing has been rotated, or it is undone.
        """
        if self._rotated is None:
            raise CompressionError("This SpinQuantModifier has rotated nothing.")
        return self._rotated

    def initialize(
        self, state: State | nn.Module, batches: Iterable[Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Rotate the model, in place.

        Args:
            state: of a run, or a model alone.
            batches: of calibration, where learnable; None for the state's calibration data.
            **kwargs: none are known.

        Raises:
            CompressionError: it was initialized before, or see `rotate` and `learn`; the model is
                as it was.
        """
        own = State(model=state) if isinstance(state, nn.Module) else state
        super().initialize(own, batches=batches, **kwargs)

    def on_initialize(
        self, state: State, batches: Iterable[Tensor] | None = None, **kwargs: Any
    ) -> bool:
        model = state.model.module if isinstance(state.model, FlexModel) else state.model
        if model is None:
            raise CompressionError("there is no model: lifecycle.initialize(model=...).")
        batches = batches if batches is not None else state.data.calib
        if self.learnable and batches is None:
            raise CompressionError("learnable=True needs calibration batches.")
        self._rotated = rotate(
            model,
            self.mappings,
            self.norm_mappings,
            rotations=self.rotations,
            transform_type=self.transform_type,
            randomize=self.randomize,
            seed=self.seed,
            block_size=self.transform_block_size,
            precision=self.precision,
            center=self.center_embeddings,
            matrices={str(kind): own for kind, own in (self.transform_config or {}).items()},
        )
        if self.learnable:
            learn(
                self._rotated,
                batches or (),
                steps=self.learning_steps,
                learning_rate=self.learning_rate,
                bits=self.learning_bits,
            )
        return True

    def finalize(self, state: State | None = None, **kwargs: Any) -> None:
        """Nothing more is to come.

        Raises:
            ModifierStateError: it was not initialized, or is finalized.
        """
        super().finalize(state or State(), **kwargs)

    def undo(self, state: State | None = None) -> None:
        """The model as it was, to within rounding; nothing, if it was not rotated."""
        super().undo(state or State())

    def on_undo(self, state: State) -> None:
        rotated, self._rotated = self._rotated, None
        if rotated is not None:
            rotated.undo()
