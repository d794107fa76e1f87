"""A small language model that was really trained, made on the spot from what Python itself carries.

Parity and pruning say little on random weights: every direction matters alike and every score is
noise. This is a Llama over bytes (token n is byte n, no tokenizer) of about a million parameters,
trained for about a minute on two cores on the text of CPython's language reference
(`pydoc_data.topics`). It is made once and kept under a cache folder; what made it is in the name
of its folder, so a changed recipe, or another Python's text, makes another model.

    python scripts/byte_llama.py
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TimeElapsedColumn
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

__all__ = ["Recipe", "byte_llama", "decode", "encode", "text_bytes", "validation_loss"]

CACHE = Path(__file__).parent.parent / ".cache"
COLUMNS = (
    "{task.description}",
    BarColumn(),
    "{task.completed}/{task.total} steps, loss {task.fields[loss]:.2f}",
    TimeElapsedColumn(),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides the weights, but for the text. Training counts steps, never seconds."""

    hidden: int = 128
    intermediate: int = 512
    layers: int = 4
    heads: int = 8
    key_value_heads: int = 4
    context: int = 256
    batch: int = 8
    steps: int = 450
    warmup: int = 50
    learning_rate: float = 3e-3
    final_rate: float = 1.5e-4
    weight_decay: float = 0.1
    seed: int = 0


def encode(text: str) -> Tensor:
    """The token ids of one text, `[1, bytes]`."""
    return torch.tensor([list(text.encode())])


def decode(ids: Tensor) -> str:
    """The text of one row of token ids; bytes that are no UTF-8 show as replacement characters."""
    return bytes(ids.flatten().tolist()).decode(errors="replace")


def text_bytes() -> tuple[Tensor, Tensor]:
    """The training and the validation text as token ids: the first nine tenths, and the rest."""
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    train, validation = ids.split([len(ids) * 9 // 10, len(ids) - len(ids) * 9 // 10])
    return train, validation


def byte_llama(cache: Path = CACHE, recipe: Recipe | None = None) -> Path:
    """The folder of the trained model, as `save_pretrained` writes it, training it where missing.

    `training.json` in it has the recipe and the validation loss. A folder appears under its name
    only when whole: an interrupted run leaves none.
    """
    recipe = recipe or Recipe()
    train, validation = text_bytes()
    folder = cache / f"byte-llama-{_key(recipe)}"
    if folder.exists():
        return folder
    model = _train(recipe, train)
    notes = {"recipe": asdict(recipe), "validation_loss": validation_loss(model, validation)}
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="byte-llama-unfinished-") as unfinished:
        whole = Path(unfinished) / "model"
        logging.disable_progress_bar()
        model.save_pretrained(whole)
        logging.enable_progress_bar()
        (whole / "training.json").write_text(json.dumps(notes, indent=2))
        if not folder.exists():  # another process may have been faster
            whole.rename(folder)
    return folder


@torch.no_grad()
def validation_loss(model: torch.nn.Module, validation: Tensor, window: int = 256) -> float:
    """Mean cross-entropy of the next byte in nats, over windows that do not overlap."""
    count = (len(validation) - 1) // window
    inputs = validation[: count * window].view(count, window)
    targets = validation[1 : count * window + 1].view(count, window)
    total = sum(
        _loss(model, some_inputs, some_targets, reduction="sum").item()
        for some_inputs, some_targets in zip(inputs.split(16), targets.split(16), strict=True)
    )
    return total / targets.numel()


def _key(recipe: Recipe) -> str:
    text = torch.cat(text_bytes()).to(torch.uint8).numpy().tobytes()
    return hashlib.sha256(json.dumps(asdict(recipe)).encode() + text).hexdigest()[:12]


def _new_model(recipe: Recipe) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.key_value_heads,
            max_position_embeddings=2 * recipe.context,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _train(recipe: Recipe, text: Tensor) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]), Progress(*COLUMNS) as progress:
        torch.manual_seed(recipe.seed)
        model = _new_model(recipe)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=recipe.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(recipe, step))
        bar = progress.add_task("training a byte-level Llama", total=recipe.steps, loss=math.nan)
        for _ in range(recipe.steps):
            starts = torch.randint(len(text) - recipe.context, (recipe.batch,))
            windows = torch.stack([text[start : start + recipe.context + 1] for start in starts])
            loss = _loss(model, windows[:, :-1], windows[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(bar, advance=1, loss=loss.item())
    return model.eval()


def _rate(recipe: Recipe, step: int) -> float:
    """The learning rate's factor: a linear warm-up, then half a cosine down to the final rate."""
    low = recipe.final_rate / recipe.learning_rate
    cosine = (1 + math.cos(math.pi * step / recipe.steps)) / 2
    return min(1.0, (step + 1) / recipe.warmup) * (low + (1 - low) * cosine)


def _loss(
    model: torch.nn.Module, inputs: Tensor, targets: Tensor, reduction: str = "mean"
) -> Tensor:
    logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


if __name__ == "__main__":
    where = byte_llama()
    notes = json.loads((where / "training.json").read_text())
    print(f"{where}: validation loss {notes['validation_loss']:.3f} nats/byte")
