"""Trains a linear probe inside the model: what kind of byte comes next, read off one MLP's neurons.

The probe is a trainable module, so an editing function applies it to the whole activation, and its
gradients are whole on every rank. The loss is computed on every rank, from the save context.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from flex_model import FlexModel, HookFunction

__all__ = ["STEPS", "train_probe"]

SITE = "model.layers.2.mlp.act_fn"
KINDS = ("space", "newline", "lower case", "upper case", "digit", "other")
STEPS = 60
BATCH, WINDOW = 8, 128


def train_probe(model: LlamaForCausalLM, text: Tensor) -> Iterator[float]:
    """The loss of each step, in nats; the model itself stays as it is."""
    model.requires_grad_(False)
    torch.manual_seed(0)  # every rank reads the same windows
    probe = nn.Linear(model.config.intermediate_size, len(KINDS))
    kinds = _kinds()
    with FlexModel(model, {}) as flex:
        flex.register_trainable_module("probe", probe)
        flex.register_forward_hook(HookFunction(SITE, editing_function=_read))
        optimizer = torch.optim.Adam(probe.parameters(), lr=3e-3)
        for _ in range(STEPS):
            windows = _windows(text)
            flex(input_ids=windows[:, :-1], use_cache=False)
            logits = flex.save_ctx.logits
            loss = F.cross_entropy(logits.flatten(0, 1), kinds[windows[:, 1:]].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            flex.output_ptr.clear()
            yield loss.item()


def _read(
    current_module: nn.Module, inputs: Tensor, save_ctx: Namespace, modules: nn.ModuleDict
) -> Tensor:
    """Stores the probe's logits and leaves the activation as it is."""
    save_ctx.logits = modules["probe"](inputs)
    return inputs


def _windows(text: Tensor) -> Tensor:
    starts = torch.randint(len(text) - WINDOW, (BATCH,))
    return torch.stack([text[start : start + WINDOW + 1] for start in starts])


def _kinds() -> Tensor:
    """The kind of each of the 256 bytes, as an index into KINDS."""
    characters = [chr(byte) for byte in range(256)]
    tests = (str.isspace, "\n".__eq__, str.islower, str.isupper, str.isdigit)
    kinds = [len(tests)] * 256
    for kind, test in enumerate(tests):
        for byte, character in enumerate(characters[:128]):
            if test(character):
                kinds[byte] = kind
    return torch.tensor(kinds)
