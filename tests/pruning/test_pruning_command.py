"""``flex-model prune``, as it is run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from pruned_models import VOCABULARY, build, logits
from safetensors.torch import load_file, save_file
from torch.distributed import TCPStore
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from flex_model.cli import app
from flex_model.pruning import Target, prune, random_scores


class _Files(NamedTuple):
    model: str
    scores: str
    tokens: str


@pytest.fixture
def files(tmp_path: Path) -> _Files:
    model = build("llama")
    found = _Files(*(str(tmp_path / name) for name in ("model", "scores", "tokens.safetensors")))
    model.save_pretrained(found.model)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    save_file(random_scores(model), found.scores)
    save_file({"tokens": torch.arange(60).view(4, 15) % VOCABULARY}, found.tokens)
    return found


def _run(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200", "NO_COLOR": "1"}).invoke(
        app, ["prune", *arguments]
    )
    return result.exit_code, result.output


def test_a_dry_run_prints_what_would_be_cut(files: _Files, tmp_path: Path) -> None:
    """Catches a dry run that writes something, or says nothing."""
    before = sorted(tmp_path.rglob("*"))
    code, output = _run(
        files.model, "--scores", files.scores, "--ffn-ratio", "0.5", "--kv-heads-size", "2",
        "--save", str(tmp_path / "new"), "--dry-run",
    )  # fmt: skip
    assert code == 0
    assert "config: intermediate_size = 22" in output
    assert "model.layers.2.self_attn.o_proj" in output
    assert sorted(tmp_path.rglob("*")) == before


def test_saves_what_prune_makes(files: _Files, tmp_path: Path) -> None:
    """Catches a command that cuts otherwise than the library, or leaves the tokenizer behind."""
    code, output = _run(
        files.model, "--scores", files.scores, "--parameters", "13000", "--over", "ffn",
        "--over", "layers", "--multiple-of", "8", "--hidden-ratio", "0.4",
        "--tokens", files.tokens, "--save", str(tmp_path / "new"),
    )  # fmt: skip
    assert code == 0, output
    assert all(word in output for word in ("before", "after", "random", "perplexity"))
    model, budget = build("llama"), Target(parameters=13_000, multiple_of=8)
    scores = random_scores(model)
    prune(model, scores, ffn=budget, layers=budget, hidden=Target(ratio=0.4, multiple_of=8))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new", attn_implementation="eager")
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert (tmp_path / "new" / "tokenizer.json").exists()


def _run_on_two_ranks(*arguments: str) -> list[tuple[int, str]]:
    """As torchrun starts them: exit codes and what each prints."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here already
        "WORLD_SIZE": "2",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "COLUMNS": "200",
        "NO_COLOR": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "flex_model", "prune", *arguments],
            env={**os.environ, **told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        output = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, text) for rank, text in zip(ranks, output, strict=True)]


def test_two_ranks_save_what_one_process_does(files: _Files, tmp_path: Path) -> None:
    """Catches a command that only runs on one process, or that each rank prints."""
    asked = (files.model, "--scores", files.scores, "--ffn-ratio", "0.5", "--save")
    assert _run(*asked, str(tmp_path / "one"))[0] == 0
    (first, told), (second, echoed) = _run_on_two_ranks(*asked, str(tmp_path / "two"))
    assert (first, second) == (0, 0), told + echoed
    assert "are left" in told
    assert "are left" not in echoed
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    refused = _run_on_two_ranks(*asked[:-3], "--ffn-size", "33", "--dry-run")
    assert [code for code, _ in refused] == [2, 2]
    assert "does not divide over 2" in refused[0][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ffn-ratio", "2", "--dry-run"], "from 0 to 1"),
        (["--ffn-ratio", "0.5"], "give --save"),
        (["--dry-run"], "Nothing to prune"),
        (["--ffn-ratio", "0.5", "--ffn-size", "3", "--dry-run"], "one of ratio, size"),
        (["--parameters", "18000", "--dry-run"], "go together"),
        (["--parameters", "18000", "--over", "width", "--dry-run"], "--over takes"),
        (["--parameters", "9", "--over", "ffn", "--ffn-size", "3", "--dry-run"], "exclude"),
        (["--ffn-ratio", "0.5", "--save", "."], "exists already"),
        (["--ffn-ratio", "0.5", "--tokens", "nowhere", "--dry-run"], "nowhere cannot be read"),
    ],
)
def test_mistakes_are_told_on_a_line(files: _Files, arguments: list[str], message: str) -> None:
    """Catches a traceback where a sentence would do."""
    code, output = _run(files.model, "--scores", files.scores, *arguments)
    assert code == 2
    assert message in output


def test_files_that_are_none_are_told(files: _Files, tmp_path: Path) -> None:
    """Catches a traceback for a wrong path."""
    ratio = ("--ffn-ratio", "0.5", "--dry-run")
    for model, scores in ((files.model, "nowhere"), (str(tmp_path / "none"), files.scores)):
        code, output = _run(model, "--scores", scores, *ratio)
        assert code == 2
        assert "Traceback" not in output
