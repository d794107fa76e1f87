"""The model on one process, and cut over ranks by transformers."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from hooks.settings import HIDDEN, INNER, LAYERS, VOCABULARY, Setting

__all__ = ["sharded", "sharing_weights", "tokens", "whole"]

logging.set_verbosity_error()
logging.disable_progress_bar()


def tokens(setting: Setting) -> Tensor:
    """Random token ids, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (setting.batch, setting.length), generator=generator)


def whole() -> LlamaForCausalLM:
    """The model with random weights, the same at every call."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def sharing_weights(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Modules of its own to hook, around the same tensors: the same arithmetic on the same data."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def sharded(count: int) -> list[LlamaForCausalLM]:
    """So many models, each cut over all ranks by transformers' own plan."""
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder, src=0)
        if dist.get_rank() == 0:
            whole().save_pretrained(folder[0])
        dist.barrier()
        models = [_load(Path(folder[0])) for _ in range(count)]
        dist.barrier()  # the folder goes when its maker leaves
    return models


def _load(folder: Path) -> LlamaForCausalLM:
    plan = DistributedConfig(tp_plan="auto")
    return LlamaForCausalLM.from_pretrained(folder, distributed_config=plan).eval()
