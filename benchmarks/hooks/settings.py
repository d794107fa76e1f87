"""The sizes of what is measured: small on purpose, so that no overhead hides behind arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "HIDDEN",
    "INNER",
    "LAYERS",
    "ONE_PROCESS",
    "TWO_RANKS",
    "VOCABULARY",
    "Setting",
    "VERSION",
]

VERSION = "0.1.0"  # of flex-model, whose package has this library's name

HIDDEN = 64
INNER = 256
LAYERS = 8
VOCABULARY = 256

_PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "mlp",
)


@dataclass(frozen=True)
class Setting:
    """How many ranks hold the model, what it is fed and which of its modules are hooked."""

    name: str
    ranks: int
    batch: int
    length: int
    hooked: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {len(self.hooked)} hooks, batch {self.batch} x {self.length} tokens"


ONE_PROCESS = Setting(
    "one process",
    ranks=1,
    batch=1,
    length=16,
    hooked=tuple(f"model.layers.{layer}.{part}" for layer in range(LAYERS) for part in _PARTS),
)
TWO_RANKS = Setting(
    "two ranks",
    ranks=2,
    batch=4,
    length=32,
    hooked=tuple(f"model.layers.{layer}.mlp.up_proj" for layer in range(LAYERS)),
)
