"""From mappings to the steps on each weight, checked in full before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from flex_model.compress.spinquant.choice import Choice
from flex_model.compress.spinquant.mapping import Found
from flex_model.compress.spinquant.norms import norm_kind
from flex_model.compress.spinquant.orthogonal import Rotation
from flex_model.compress.spinquant.sharded import Cut, cuts_of
from flex_model.compress.spinquant.steps import Centre, Scale, Step, Turn, Weight
from flex_model.errors import CompressionError
from flex_model.layouts.fused import features_of
from flex_model.layouts.names import named_modules

__all__ = ["Model", "Turns", "check_centring", "chosen_turns", "fusing_steps", "turning_steps"]

Steps = dict[str, list[Step]]


@dataclass(frozen=True)
class Turns:
    """The matrices in use: R1, and by layer R2, R3 and R4."""

    r1: Rotation | None
    r2: Mapping[str, Rotation]
    r3: Mapping[str, Rotation]
    r4: Mapping[str, Rotation]


class Model:
    """A model's modules by their part, and their weights as this rank holds them."""

    def __init__(self, root: nn.Module, found: Found) -> None:
        self.root = root
        self.found = found
        self.modules = dict(named_modules(root))
        self._cuts: dict[str, tuple[Cut | None, ...]] = {}
        self.norms = {name: norm_kind(self.modules[name], name) for name in found.norms}
        self._check_spread()
        self._check_parameters()
        (embedding,) = found["embedding"]
        self.hidden = self.weight(embedding).shape[-1]
        self._check_shapes()

    @property
    def layered(self) -> bool:
        """Whether its norms are LayerNorms, behind which a mean has no effect."""
        return bool(self.norms) and all(norm.kind == "layer" for norm in self.norms.values())

    @property
    def tied(self) -> bool:
        """Whether the head's weight is the embedding's."""
        embedding, head = self.found["embedding"][0], self.found["lm_head"][0]
        return self.modules[head].weight is self.modules[embedding].weight

    @property
    def writers(self) -> tuple[str, ...]:
        """Layers that add to the residual stream, but for embeddings."""
        return (*self.found["attn_o"], *self.found["mlp_out"])

    @property
    def readers(self) -> tuple[str, ...]:
        """Layers that read the stream, behind a norm."""
        parts = ("attn_q", "attn_k", "attn_v", "attn_qkv", "mlp_in", "lm_head")
        return tuple(name for part in parts for name in self.found[part])

    def weight(self, name: str, own: str = "weight") -> Weight:
        """A parameter of a module."""
        parameter: Any = getattr(self.modules[name], own)
        path = f"{name}.{own}"
        if path not in self._cuts:  # walks the whole model
            self._cuts[path] = cuts_of(self.root, path, parameter)
        return Weight(path, parameter, self._cuts[path])

    def has_bias(self, name: str) -> bool:
        return getattr(self.modules[name], "bias", None) is not None

    @property
    def head_dim(self) -> int:
        """Features of one attention head.

        Raises:
            CompressionError: nothing tells it.
        """
        attention = self.modules[self.found["attn"][0]]
        for holder in (attention, getattr(attention, "config", None)):
            told = getattr(holder, "head_dim", None) or getattr(holder, "kv_channels", None)
            if isinstance(told, int):
                return self.found.mapping.attn_head_dim or told
        if self.found.mapping.attn_head_dim is None:
            raise CompressionError(
                f"Nothing tells the size of a head of {type(attention).__name__}: give "
                "SpinQuantMapping(attn_head_dim=...)."
            )
        return self.found.mapping.attn_head_dim

    def values(self, name: str) -> Tensor | None:
        """Where values lie in a fused projection: ``[heads, head_dim]``; None if all are values."""
        if name in self.found["attn_v"]:
            return None
        return features_of(self.root, name, "output").select("v", None).view(-1, self.head_dim)

    def _check_spread(self) -> None:
        first = isinstance(self.root, FullyShardedDataParallel)
        if first or any(isinstance(m, FullyShardedDataParallel) for m in self.modules.values()):
            raise CompressionError(
                "FSDP1 keeps weights in one flat tensor, of which no part can be rotated. Rotate "
                "before wrapping the model, or use fully_shard (FSDP2)."
            )
        fully = any(isinstance(module, FSDPModule) for module in self.root.modules())
        if fully and (self.tied or self.layered):
            raise CompressionError(
                "FSDP2 manages the parameters that it found, but tied embeddings and LayerNorms "
                "need others. Rotate before fully_shard."
            )
        if len(set(self.norms.values())) > 1:
            kinds = sorted({f"{type(self.modules[name]).__name__}" for name in self.norms})
            raise CompressionError(f"Norms of several kinds are in one model: {', '.join(kinds)}.")

    def _check_parameters(self) -> None:
        """That each parameter is here, may be written, and is one module's alone."""
        owners: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            for own, parameter in module._parameters.items():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append(f"{name}.{own}")
        both = {f"{self.found[part][0]}.weight" for part in ("embedding", "lm_head")}
        for name in sorted(self.found.named):
            module = self.modules[name]
            if name not in self.found["attn"] and not hasattr(module, "weight"):
                raise CompressionError(f"{name} ({type(module).__name__}) has no weight.")
            for own in ("weight", "bias"):
                parameter = module._parameters.get(own)
                path = f"{name}.{own}"
                if own == "weight" and parameter is None and name not in self.found["attn"]:
                    raise CompressionError(f"{path} is no parameter of its own (tied, or without).")
                if parameter is not None:
                    _check_parameter(path, parameter, owners[id(parameter)], both)

    def _check_shapes(self) -> None:
        parts = {
            1: (*self.readers, *self.found["positions"]),
            0: self.writers,
        }
        for dim, names in parts.items():
            for name in names:
                shape = self.weight(name).shape
                if len(shape) != 2 or shape[dim] != self.hidden:
                    raise CompressionError(
                        f"{name} has a weight of shape {shape}, but dim {dim} should be the "
                        f"{self.hidden} features of the residual stream."
                    )


def _check_parameter(path: str, parameter: Tensor, owners: Sequence[str], tied: set[str]) -> None:
    if parameter.is_meta:
        raise CompressionError(f"{path} has no values (it is on the meta device): load it first.")
    if not parameter.requires_grad:
        raise CompressionError(
            f"{path} is frozen (requires_grad=False), so it is not changed. Unfreeze it first."
        )
    if not parameter.is_floating_point():
        raise CompressionError(f"{path} is of {parameter.dtype}: rotate before quantizing.")
    if len(owners) > 1 and set(owners) != tied:
        raise CompressionError(
            f"{', '.join(owners)} are one tied parameter, which would be changed for each. Only "
            "a head tied to the embedding can be untied."
        )


def check_centring(model: Model, choice: Choice) -> None:
    """That LayerNorms are centred.

    Raises:
        CompressionError: they are not to be.
    """
    if model.layered and choice.center is False:
        raise CompressionError("LayerNorms subtract the mean: they cannot be fused uncentred.")


def fusing_steps(model: Model, choice: Choice) -> Steps:
    """Centring where it is exact or forced, then each norm's factors into its readers."""
    steps: Steps = {}
    center = model.layered if choice.center is None else choice.center
    if center:
        for name in (*model.found["embedding"], *model.found["positions"]):
            _add(steps, f"{name}.weight", Centre(1))
    if center and model.layered:
        for name in model.writers:
            _add(steps, f"{name}.weight", Centre(0))
            if model.has_bias(name):
                _add(steps, f"{name}.bias", Centre(0))
    for norm, readers in model.found.norms.items():
        factors = model.weight(norm).whole() + model.norms[norm].offset
        for name in readers:
            _add(steps, f"{name}.weight", Scale(1, factors))
    return steps


def turning_steps(model: Model, turns: Turns) -> Steps:
    """Rotating weights: R1 on the stream's, R2 between values and output, R4's fused half."""
    steps: Steps = {}
    if turns.r1 is not None:
        for name in (*model.found["embedding"], *model.found["positions"], *model.readers):
            _add(steps, f"{name}.weight", Turn(1, turns.r1))
        for name in model.writers:
            _add(steps, f"{name}.weight", Turn(0, turns.r1))
            if model.has_bias(name):
                _add(steps, f"{name}.bias", Turn(0, turns.r1))
    values = model.found["attn_v"] or model.found["attn_qkv"]
    for value, output in zip(values, model.found["attn_o"], strict=True):
        if output in turns.r2:
            rotation, positions = turns.r2[output], model.values(value)
            positions = None if positions is None else positions.view(-1, rotation.size)
            _add(steps, f"{value}.weight", Turn(0, rotation, positions))
            if model.has_bias(value):
                _add(steps, f"{value}.bias", Turn(0, rotation, positions))
            _add(steps, f"{output}.weight", Turn(1, rotation))
    for name, rotation in turns.r4.items():
        _add(steps, f"{name}.weight", Turn(1, rotation))
    return steps


def chosen_turns(model: Model, choice: Choice) -> Turns:
    """The matrices of a choice for a model, which shows whether they all exist."""
    wanted, found = choice.rotations, model.found
    inner = {name: model.weight(name).shape[1] for name in found["mlp_out"]}
    heads = model.head_dim if {"R2", "R3"} & set(wanted) else 0
    if "R1" in wanted:
        _check_readers(model)
    if "R2" in wanted:
        for name in found["attn_o"]:
            if model.weight(name).shape[1] % heads:
                raise CompressionError(f"{name} reads no whole number of heads of {heads}.")
    return Turns(
        choice.rotation("R1", model.hidden, found["embedding"][0]) if "R1" in wanted else None,
        {n: choice.rotation("R2", heads, n) for n in found["attn_o"] if "R2" in wanted},
        {n: choice.rotation("R3", heads, n) for n in found["attn"] if "R3" in wanted},
        {n: choice.rotation("R4", inner[n], n) for n in found["mlp_out"] if "R4" in wanted},
    )


def _check_readers(model: Model) -> None:
    """A norm's own factors would come between R1 and a layer that turns it back."""
    behind = {name for readers in model.found.norms.values() for name in readers}
    left = [name for name in model.readers if name not in behind]
    if left:
        raise CompressionError(
            f"R1 needs the norm before each reader fused, but norm_mappings name none of "
            f"{', '.join(left[:3])}{' ...' if len(left) > 3 else ''}."
        )


def _add(steps: Steps, name: str, step: Step) -> None:
    steps.setdefault(name, []).append(step)
