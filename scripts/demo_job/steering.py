"""Steers what the model writes: adds the difference of two prompts' activations to one layer's."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from byte_llama import decode, encode
from flex_model import FlexModel, HookFunction

__all__ = ["steer"]

SITE = "model.layers.1"
TOWARDS = "__init__ __getattr__ __setattr__ __len__ __class__ __dict__ __name__"
AWAY = "the method is called with the attribute name and the class of the object"
STRENGTH = 0.6
PROMPT = "The statement "


@torch.no_grad()
def steer(model: LlamaForCausalLM) -> dict[str, str]:
    """The same prompt continued with the same random draws, `before` and `after` steering."""
    direction = STRENGTH * (_mean_activation(model, TOWARDS) - _mean_activation(model, AWAY))

    def push(
        current_module: nn.Module, inputs: Tensor, save_ctx: Namespace, modules: nn.ModuleDict
    ) -> Tensor:
        return inputs + direction

    before = _continue(model.generate)
    with FlexModel(model, {}) as flex:
        flex.register_forward_hook(HookFunction(SITE, editing_function=push))
        return {"before": before, "after": _continue(flex.generate)}


def _mean_activation(model: nn.Module, text: str) -> Tensor:
    """A record is on rank 0 only; what every rank needs goes through the save context."""

    def average(
        current_module: nn.Module, inputs: Tensor, save_ctx: Namespace, modules: nn.ModuleDict
    ) -> Tensor:
        save_ctx.mean = inputs.mean(dim=(0, 1))
        return inputs

    with FlexModel(model, {}) as flex:
        flex.register_forward_hook(HookFunction(SITE, editing_function=average))
        flex(input_ids=encode(text), use_cache=False)
        return flex.save_ctx.mean


def _continue(generate: Callable[..., Tensor]) -> str:
    torch.manual_seed(0)  # every rank draws the same bytes
    ids = generate(encode(PROMPT), max_new_tokens=120, do_sample=True, temperature=0.6)
    return decode(ids)
