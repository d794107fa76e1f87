"""The trained model that demo, tests and benchmarks share: made once, whole or not at all."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import byte_llama
from byte_llama import Recipe

TINY = Recipe(hidden=16, intermediate=32, layers=1, heads=2, key_value_heads=1, steps=2, batch=2)


def test_is_trained_once_for_each_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = byte_llama.byte_llama(tmp_path, TINY)
    other = byte_llama.byte_llama(tmp_path, replace(TINY, seed=1))
    monkeypatch.setattr(byte_llama, "_train", lambda *_: pytest.fail("trained again"))

    assert byte_llama.byte_llama(tmp_path, TINY) == first != other
    assert sorted(tmp_path.iterdir()) == sorted([first, other])


def test_loads_as_the_model_that_was_measured(tmp_path: Path) -> None:
    folder = byte_llama.byte_llama(tmp_path, TINY)
    model = LlamaForCausalLM.from_pretrained(folder)

    measured = json.loads((folder / "training.json").read_text())["validation_loss"]
    assert byte_llama.validation_loss(model, byte_llama.text_bytes()[1]) == pytest.approx(measured)


def test_an_interrupted_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(model: LlamaForCausalLM, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        byte_llama.byte_llama(tmp_path, TINY)
    assert list(tmp_path.iterdir()) == []


def test_training_leaves_the_random_stream_as_it_was(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    byte_llama.byte_llama(tmp_path, TINY)
    assert before.equal(torch.get_rng_state())


def test_text_and_bytes() -> None:
    train, validation = byte_llama.text_bytes()
    assert len(train) == pytest.approx(9 * len(validation), rel=1e-3)
    text = byte_llama.decode(train)
    assert "statement" in text
    assert byte_llama.encode(text)[0].equal(train)
