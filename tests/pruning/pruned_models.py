"""Small decoder models, one of each kind, whose dims have lengths that tell them apart."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging

from flex_model.pruning import Target

VOCABULARY = 34
HIDDEN = 24
INNER = 44
HEADS = 8
KV_HEADS = 4
HEAD_DIM = 8
LAYERS = 3
EXPERTS = 6
CHOSEN = 2
EXPERT_INNER = 20
SHARED_INNER = 28

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "initializer_range": 0.3,
    "attn_implementation": "eager",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MIXED: dict[str, Any] = {"num_experts_per_tok": CHOSEN, "experts_implementation": "eager"}
QWEN_MIXED: dict[str, Any] = {
    **MIXED,
    "num_experts": EXPERTS,
    "moe_intermediate_size": EXPERT_INNER,
    "mlp_only_layers": [1],
    "norm_topk_prob": True,
}

# Classes by their prefix, and what else their config takes.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 4}),
    "gemma3": ("Gemma3", {"sliding_window": 4}),
    "phi3": ("Phi3", {}),
    "mixtral": ("Mixtral", {**MIXED, "num_local_experts": EXPERTS}),
    "qwen2_moe": ("Qwen2Moe", {**QWEN_MIXED, "shared_expert_intermediate_size": SHARED_INNER}),
    "qwen3_moe": ("Qwen3Moe", QWEN_MIXED),
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")

# What can be cut of every kind, so that one or two ranks hold it evenly.
ALL = {
    "ffn": Target(ratio=0.5),
    "kv_heads": Target(size=2),
    "hidden": Target(size=20),
    "layers": Target(size=2),
}

logging.set_verbosity_error()
logging.disable_progress_bar()


def build(kind: str, **changed: Any) -> Any:
    """A model with random weights, biases and norms too."""
    prefix, own = KINDS[kind]
    config_class = getattr(transformers, f"{prefix}{'Text' if kind == 'gemma3' else ''}Config")
    config = config_class(**{**COMMON, **own, **changed})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.normal_(0.5, 0.2)
    return model.eval()


def targets(kind: str) -> dict[str, Target]:
    """All that can be cut of a kind."""
    return {**ALL, "experts": Target(size=3)} if kind in MIXTURES else ALL


def ids() -> Tensor:
    """Token ids, ``[2, 7]``."""
    return torch.arange(14).view(2, 7) * 5 % VOCABULARY


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=ids()).logits


def highest(scores: Tensor, size: int) -> list[int]:
    """The indexes with the highest scores, ascending: spelled without what is tested."""
    return sorted(sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:size])


def snapshot(model: Any) -> tuple[Any, ...]:
    """All that pruning could change: the very tensors, the config, the numbers of modules."""
    numbers = {
        name: {k: v for k, v in vars(module).items() if isinstance(v, (int, float))}
        for name, module in model.named_modules()
    }
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    spelled = {name: tensor.tolist() for name, tensor in buffers.items()}
    return tensors, numbers, spelled, model.config.to_dict()
