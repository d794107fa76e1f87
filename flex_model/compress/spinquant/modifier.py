"""SpinQuant as a step of a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator
from torch import Tensor, nn

from flex_model.compress.spinquant.choice import Kind, TransformType
from flex_model.compress.spinquant.learn import learn
from flex_model.compress.spinquant.mapping import NormMapping, SpinQuantMapping
from flex_model.compress.spinquant.rotate import Rotations, rotate
from flex_model.errors import CompressionError

__all__ = ["SpinQuantModifier"]


class SpinQuantModifier(BaseModel):
    """Rotates a model when it is initialized; see `rotate` and `learn` for what the fields mean.

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

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

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
    _finalized: bool = PrivateAttr(default=False)

    @field_validator("rotations", mode="before")
    @classmethod
    def _in_capitals(cls, value: Any) -> Any:
        one_by_one = isinstance(value, (list, tuple))
        return tuple(str(one).upper() for one in value) if one_by_one else value

    def initialize(self, state_or_model: Any, batches: Iterable[Tensor] | None = None) -> Rotations:
        """Rotate the model, in place.

        Args:
            state_or_model: the model, or what holds it as ``model`` (and batches as
                ``data.calib``).
            batches: of calibration, where learnable.

        Raises:
            CompressionError: it was initialized before, or see `rotate` and `learn`; the model is
                as it was.
        """
        if self._rotated is not None or self._finalized:
            raise CompressionError("This modifier has rotated a model already: make another one.")
        whole = isinstance(state_or_model, nn.Module)
        model: nn.Module = state_or_model if whole else state_or_model.model
        if batches is None and not whole:
            batches = getattr(getattr(state_or_model, "data", None), "calib", None)
        if self.learnable and batches is None:
            raise CompressionError("learnable=True needs calibration batches.")
        rotated = rotate(
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
            self._learn(rotated, batches or ())
        self._rotated = rotated
        return rotated

    def _learn(self, rotated: Rotations, batches: Iterable[Tensor]) -> None:
        try:
            learn(
                rotated,
                batches,
                steps=self.learning_steps,
                learning_rate=self.learning_rate,
                bits=self.learning_bits,
            )
        except BaseException:
            rotated.undo()
            raise

    def finalize(self) -> None:
        """Nothing more is to come; the model stays rotated, and its online hooks stay.

        Raises:
            CompressionError: it was not initialized, or is finalized.
        """
        if self._rotated is None or self._finalized:
            raise CompressionError("Only a modifier that is initialized can be finalized, once.")
        self._finalized = True

    def undo(self) -> None:
        """The model as it was, to within rounding.

        Raises:
            CompressionError: nothing has been rotated, or it is undone.
        """
        if self._rotated is None:
            raise CompressionError("This modifier has rotated nothing.")
        self._rotated.undo()
