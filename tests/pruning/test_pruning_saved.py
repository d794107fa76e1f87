"""A pruned model as a checkpoint: transformers alone loads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pruned_models import KINDS, VOCABULARY, build, logits, targets
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from flex_model.errors import PruningError
from flex_model.pruning import Target, prune, random_scores, save
from flex_model.testing.compare import relative_error


def _loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_loads_what_was_pruned(kind: str, tmp_path: Path) -> None:
    """Catches a config that builds another model than the weights are of."""
    model = build(kind)
    prune(model, random_scores(model, 7), **targets(kind))
    save(model, tmp_path / "new" / "model")
    loaded = _loaded(tmp_path / "new" / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.hidden_size == 20
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model"], "something is left over"


def test_the_width_of_heads_is_told_where_it_followed_from_others(tmp_path: Path) -> None:
    """Catches heads that get another width once the config's hidden size is another."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = Qwen2Config(hidden_size=32, intermediate_size=44, vocab_size=VOCABULARY, **sizes)
    assert getattr(config, "head_dim", None) is None
    model = Qwen2ForCausalLM(config).eval()
    prune(model, random_scores(model), hidden=Target(size=20), kv_heads=Target(size=1))
    save(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["head_dim"] == 8
    assert relative_error(logits(_loaded(tmp_path / "model")), logits(model)) <= 1e-5


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    """Catches a checkpoint that has grown by the head's copy."""
    model = build("qwen3")
    prune(model, random_scores(model), hidden=Target(size=16))
    save(model, tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


def test_the_dtype_stays(tmp_path: Path) -> None:
    """Catches weights that are widened on the way."""
    model = build("llama").bfloat16()
    prune(model, random_scores(model), ffn=Target(ratio=0.5))
    save(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """Catches a model written over another one."""
    (tmp_path / "model").mkdir()
    with pytest.raises(PruningError, match="exists already"):
        save(build("llama"), tmp_path / "model")
    assert not any((tmp_path / "model").iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Catches an operating system's error without the folder's name."""
    (tmp_path / "file").write_text("")
    with pytest.raises(PruningError, match="file/model cannot be written"):
        save(build("llama"), tmp_path / "file" / "model")
