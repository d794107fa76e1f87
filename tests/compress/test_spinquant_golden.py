"""SpinQuant as llmcompressor 0.14.0.1 runs it: the same weights come of the same model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from flex_model.compress.spinquant import center_embeddings, fuse_norm_linears, rotate

GOLDEN = Path(__file__).parent / "golden"
INDEX = json.loads((GOLDEN / "spinquant_index.json").read_text())
WHOLE = [case for case in INDEX["cases"] if "model" in case]
FUSED = [case for case in INDEX["cases"] if "model" not in case]
WEIGHTS, LOGITS = INDEX["tolerance"]["weights_atol"], INDEX["tolerance"]["logits_atol"]


def _model(told: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    config = LlamaConfig(
        vocab_size=told["vocab"],
        hidden_size=told["hidden_size"],
        intermediate_size=told["intermediate_size"],
        num_hidden_layers=told["layers"],
        num_attention_heads=told["heads"],
        num_key_value_heads=told["kv_heads"],
        head_dim=told["head_dim"],
        rms_norm_eps=told["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": told["rope_theta"]},
        tie_word_embeddings=told["tied_before"],
        attention_bias=told["bias"],
        mlp_bias=told["bias"],
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights)
    return model


def _part(tensors: dict[str, Tensor], which: str) -> dict[str, Tensor]:
    return {n.removeprefix(which): t for n, t in tensors.items() if n.startswith(which)}


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case["id"])
@torch.no_grad()
def test_weights_and_logits(case: dict[str, Any]) -> None:
    """Catches a rotation of the other side, of the other dim, by another matrix, and norms left."""
    tensors = load_file(GOLDEN / case["file"])
    model = _model(case["model"], _part(tensors, "before."))
    ids = tensors["input_ids"]
    assert torch.allclose(model(input_ids=ids).logits, tensors["logits_before"], atol=LOGITS)
    rotate(model, rotations=case["rotations"], center=case["center_embeddings"])
    found = model.state_dict()
    due = _part(tensors, "after.")
    assert found.keys() == due.keys()
    for name, value in due.items():
        assert torch.allclose(found[name], value, rtol=0, atol=WEIGHTS), name
    found_logits = model(input_ids=ids).logits
    assert torch.allclose(found_logits, tensors["logits_after"], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("case", FUSED, ids=lambda case: case["id"])
@torch.no_grad()
def test_centring_and_fusing(case: dict[str, Any]) -> None:
    """Catches rounding twice, and a norm that keeps its factors."""
    tensors = load_file(GOLDEN / case["file"])
    dtype = tensors["emb.before"].dtype
    modules = {
        name: _holding(module, tensors[f"{name}.before"])
        for name, module in {
            "emb": nn.Embedding(11, 12, dtype=dtype),
            "norm": nn.RMSNorm(12, dtype=dtype),
            "lin0": nn.Linear(12, 5, bias=False, dtype=dtype),
            "lin1": nn.Linear(12, 7, bias=False, dtype=dtype),
        }.items()
    }
    center_embeddings(modules["emb"])
    fuse_norm_linears(modules["norm"], [modules["lin0"], modules["lin1"]])
    for name, module in modules.items():
        due = tensors[f"{name}.after"]
        assert module.weight.dtype == due.dtype
        assert torch.allclose(module.weight.double(), due.double(), rtol=0, atol=WEIGHTS), name


def _holding(module: Any, weight: Tensor) -> Any:
    module.weight.copy_(weight)
    return module
