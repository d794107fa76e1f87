"""The golden cases, made by the reference implementation (see golden/), read as tests need them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def cases(hook: str, index: str = "index.json") -> list[dict[str, Any]]:
    """The cases of one hook class, in the index's order."""
    return [case for case in json.loads((GOLDEN / index).read_text())["cases"]
            if case["hook"] == hook]  # fmt: skip


def named(hook: str, name: str) -> dict[str, Any]:
    (found,) = [case for case in cases(hook) if case["case"] == name]
    return found


def with_values(hook: str) -> list[Any]:
    """The cases that tell numbers of a run, as pytest parameters."""
    found = [case for case in cases(hook) if case.get("inputs") and "expected" in case]
    return [pytest.param(case, id=case["case"]) for case in found]


def tensors(case: dict[str, Any]) -> dict[str, Tensor]:
    return load_file(GOLDEN / case["file"])


class MegatronLike(nn.Module):
    """Has only ``weight`` and ``input_size``, and hands its bias out beside the output."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.input_size = inputs
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.weight.T, self.bias


def layer_of(case: dict[str, Any], values: dict[str, Tensor]) -> nn.Module:
    """The layer of a case, with its weights."""
    told = case["constructor"]["layer"]
    kind = told["kind"]
    layer: nn.Module
    if kind == "nn.Linear":
        layer = nn.Linear(told["in"], told["out"], bias=told["bias"])
    elif kind.startswith("megatron_like"):
        layer = MegatronLike(told["in"], told["out"])
    elif kind == "nn.LayerNorm":
        layer = nn.LayerNorm(told["hidden"], eps=told["eps"])
    else:
        layer = nn.RMSNorm(told["hidden"], eps=told["eps"])
    layer.to(DTYPES[case["dtype"]])
    layer.weight.data.copy_(values[case["weight"]])
    if "bias" in case:
        layer.bias.data.copy_(values[case["bias"]])
    return layer


def kv_kwargs(case: dict[str, Any]) -> dict[str, Any]:
    """What the key-value hook is constructed with."""
    made = case["constructor"]
    attention = SimpleNamespace(num_key_value_heads=made["num_key_value_heads"])
    kwargs = {
        "model": SimpleNamespace(config=SimpleNamespace(**made["model_config"])),
        "block_config": SimpleNamespace(attention=attention),
    }
    if made["optimize_for"] is not None:
        kwargs["optimize_for"] = made["optimize_for"]
    return kwargs
