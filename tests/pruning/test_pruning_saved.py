"""A pruned model as a checkpoint: transformers alone loads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pruned_models import KINDS, build, logits, targets
from safetensors.torch import load_file

from flex_model.errors import PruningError
from flex_model.pruning import Target, prune, random_scores, save


def _loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

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
