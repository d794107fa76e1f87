"""Rotating a model in place so that its activations have no outliers, and its outputs stay.

After SpinQuant (Liu et al. 2024, arXiv 2405.16406, sec. 3) and QuaRot (Ashkboos et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from flex_model.compress.spinquant.agreement import agreed
from flex_model.compress.spinquant.choice import Choice, Kind, TransformType
from flex_model.compress.spinquant.mapping import NormMapping, SpinQuantMapping, find, infer
from flex_model.compress.spinquant.norms import as_rms_norm
from flex_model.compress.spinquant.online import check_heads, rotate_heads, rotate_input
from flex_model.compress.spinquant.plan import (
    Model,
    Turns,
    check_centring,
    chosen_turns,
    fusing_steps,
    turning_steps,
)
from flex_model.compress.spinquant.sharded import local_of
from flex_model.compress.spinquant.steps import Shift, Step
from flex_model.errors import CompressionError

__all__ = ["Rotations", "rotate"]

_MARK = "_flex_model_rotations"


class Rotations:
    """A model that has been rotated: what by, and the way back.

    Attributes:
        model: its modules by part.
        turns: the matrices.
        choice: what was asked for.
    """

    def __init__(self, model: Model, turns: Turns, choice: Choice) -> None:
        self.model = model
        self.turns = turns
        self.choice = choice
        self._undo = ExitStack()
        self._active = False

    def undo(self) -> None:
        """Hooks off, and the weights as they were to within rounding. Collective as `rotate` was.

        Raises:
            CompressionError: it has been undone.
        """
        if not self._active:
            raise CompressionError("These rotations have been undone already.")
        _reshard(self.model.root)
        self._active = False
        with torch.no_grad():
            self._undo.close()

    def write(self, steps: Mapping[str, Sequence[Step]]) -> None:
        """Take steps on weights, each remembered for `undo`."""
        for name, own in steps.items():
            module, _, leaf = name.rpartition(".")
            weight, precision = self.model.weight(module, leaf), self.choice.precision
            self._undo.callback(weight.change, weight.change(own, precision), precision)

    def run(self) -> None:
        """Everything, or nothing where something fails."""
        self._active = vars(self.model.root)[_MARK] = True
        self._undo.callback(vars(self.model.root).pop, _MARK)
        try:
            with torch.no_grad():
                steps = fusing_steps(self.model, self.choice)
                for name, own in turning_steps(self.model, self.turns).items():
                    steps.setdefault(name, []).extend(own)
                self._untie()
                self._shift_biases()
                self.write(steps)
                self._clear_norms()
            for name, rotation in self.turns.r3.items():
                rotate_heads(self.model.modules[name], rotation, self._undo)
            for name, rotation in self.turns.r4.items():
                cut = self.model.weight(name).cuts[1]
                rotate_input(self.model.modules[name], rotation, cut, self._undo)
        except BaseException:
            self._active = False
            self._undo.close()
            raise

    def _untie(self) -> None:
        """The head gets a weight of its own, for it takes in the last norm's factors."""
        if not self.model.tied:
            return
        head = self.model.modules[self.model.found["lm_head"][0]]
        weight: nn.Parameter = head.weight  # type: ignore[assignment]
        self._undo.callback(setattr, head, "weight", weight)
        head.weight = nn.Parameter(weight.detach().clone())
        config: Any = getattr(self.model.root, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            self._undo.callback(setattr, config, "tie_word_embeddings", True)
            config.tie_word_embeddings = False

    def _shift_biases(self) -> None:
        """``b <- b + W beta`` of each LayerNorm's bias, before W changes."""
        for norm, readers in self.model.found.norms.items():
            beta: Any = getattr(self.model.modules[norm], "bias", None)
            for name in readers if beta is not None else ():
                module: Any = self.model.modules[name]
                amount = local_of(module.weight).double() @ local_of(beta).double()
                if self.model.has_bias(name):
                    self.write({f"{name}.bias": [Shift(amount)]})
                else:
                    self._undo.callback(setattr, module, "bias", None)
                    module.bias = nn.Parameter(amount.to(module.weight.dtype))
                    module.bias.__dict__.update(module.weight.__dict__)  # how Megatron cuts it

    def _clear_norms(self) -> None:
        for name, kind in self.model.norms.items():
            norm: Any = self.model.modules[name]
            if kind.kind == "layer":
                owner, _, own = name.rpartition(".")
                parent = self.model.modules[owner]
                self._undo.callback(parent._modules.__setitem__, own, norm)
                parent._modules[own] = as_rms_norm(norm)
            else:
                weight = local_of(norm.weight)
                self._undo.callback(weight.copy_, weight.clone())
                weight.fill_(1.0 - kind.offset)


def rotate(
    model: nn.Module,
    mapping: SpinQuantMapping | None = None,
    norms: Sequence[NormMapping] | None = None,
    *,
    rotations: Sequence[Kind] = ("R1", "R2", "R4"),
    transform_type: TransformType = "hadamard",
    randomize: bool = False,
    seed: int = 0,
    block_size: int | None = None,
    precision: torch.dtype = torch.float64,
    center: bool | None = None,
    matrices: Mapping[str, Tensor] | None = None,
) -> Rotations:
    """Rotate a model in place, whole or sharded. Its outputs stay to within rounding.

    A head tied to the embedding is untied, norms fused into what reads them, LayerNorms made
    RMSNorms of a centred stream; then weights are rotated, each by itself, and hooks added for what
    is rotated online. Nothing is written before all has been checked.

    Args:
        model: a decoder; its tensor-parallel, FSDP2 or DTensor weights are changed on each rank.
        mapping: its modules by part; None to infer them.
        norms: its norms and what reads them; None to infer them.
        rotations: see `Choice`, as all others.
        transform_type: the kind of matrix.
        randomize: one for each layer.
        seed: of what is drawn.
        block_size: of the matrices; None for the whole dims.
        precision: of the computation.
        center: None where it is exact.
        matrices: of one's own.

    Raises:
        CompressionError: the model or what is asked does not fit; the model is as it was.
    """

    def prepared() -> Rotations:
        choice = Choice(
            tuple(rotations), transform_type, randomize, seed, block_size, precision, center,
            dict(matrices or {}),
        )  # fmt: skip
        return _prepared(model, mapping, norms, choice)

    _reshard(model)
    fully = any(isinstance(module, FSDPModule) for module in model.modules())
    # Only then do ranks wait for each other.
    found = agreed(model, prepared, _spelled) if fully or "R4" in rotations else prepared()
    found.run()
    return found


def _prepared(
    model: nn.Module,
    mapping: SpinQuantMapping | None,
    norms: Sequence[NormMapping] | None,
    choice: Choice,
) -> Rotations:
    """All that is to be done, checked; nothing is written, and nothing exchanged."""
    if getattr(model, _MARK, False):
        raise CompressionError("This model is rotated already: undo() that first.")
    if mapping is None or norms is None:
        inferred = infer(model)
        mapping, norms = mapping or inferred[0], inferred[1] if norms is None else norms
    known = Model(model, find(model, mapping, norms))
    turns = chosen_turns(known, choice)
    for name in turns.r3:
        check_heads(known.modules[name], name)
    check_centring(known, choice)
    _check_head_bias(known)
    return Rotations(known, turns, choice)


def _spelled(rotations: Rotations) -> str:
    """What ranks must have alike: their modules, choices and matrices."""
    choice, turns = rotations.choice, rotations.turns
    drawn = (choice.rotations, choice.transform_type, choice.randomize, choice.seed)
    rest = (choice.block_size, choice.precision, choice.center, rotations.model.found)
    own = {kind: matrix.double().tolist() for kind, matrix in choice.matrices.items()}
    return f"{drawn} {rest} {own} {[*turns.r2, *turns.r3, *turns.r4]}"


def _reshard(model: nn.Module) -> None:
    """FSDP2 may hold weights gathered since the last forward; what is written then is lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _check_head_bias(model: Model) -> None:
    for norm, readers in model.found.norms.items():
        bias = getattr(model.modules[norm], "bias", None)
        for name in readers if bias is not None else ():
            if not model.has_bias(name) and isinstance(model.modules[name].weight, DTensor):
                raise CompressionError(
                    f"{name} has no bias to hold that of {norm}, and gets none while it is a "
                    "DTensor. Rotate before the model is sharded."
                )
