"""Small models to rotate, with norms away from one, biases and grouped queries."""

from itertools import combinations
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging

VOCABULARY, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 34, 32, 64, 4, 2, 8

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 4}),
    "phi3": ("Phi3", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
SUBSETS = [c for n in range(1, 5) for c in combinations(("R1", "R2", "R3", "R4"), n)]

logging.set_verbosity_error()
logging.disable_progress_bar()


def build(kind: str = "llama", attention: str = "sdpa", **changed: Any) -> Any:
    """A model with random weights, biases and norms too."""
    if kind == "opt":
        return _opt(attention, **changed)
    prefix, own = KINDS[kind]
    config = getattr(transformers, f"{prefix}Config")(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "initializer_range": 0.15,
            "attn_implementation": attention,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **own,
            **changed,
        }
    )
    return _filled(getattr(transformers, f"{prefix}ForCausalLM"), config)


def _opt(attention: str, **changed: Any) -> Any:
    config = transformers.OPTConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": INNER,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 16,
            "init_std": 0.15,
            "dropout": 0.0,
            "attn_implementation": attention,
            **changed,
        }
    )
    return _filled(transformers.OPTForCausalLM, config)


def _filled(made: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = made(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.normal_(0.6, 0.3)
    return model.eval()


def ids() -> Tensor:
    """Token ids, ``[2, 7]``."""
    return torch.arange(14).view(2, 7) * 5 % VOCABULARY


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=ids()).logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
