"""``flex-model score`` as it is run: plain, on ranks, killed and started again."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import TCPStore
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from flex_model.cli import app
from flex_model.errors import ConfigurationError
from flex_model.importance import load_scores
from flex_model.loading.token_files import TokenBatches, Tokens, read_tokens

ROOT = Path(__file__).parent.parent.parent
TEXT = "It is not the strongest of the channels that survives, but the one most scored. " * 24
CONFIG = """
targets:
  - {pattern: model.layers.*.mlp.down_proj, kind: iterative}
  - {pattern: model.layers.*.self_attn.o_proj, kind: kv_heads}
  - {pattern: model.layers.*.self_attn.o_proj, kind: heads}
  - {pattern: model.layers.*.input_layernorm, kind: layer_norm}
  - {pattern: model.layers.*norm, kind: hidden}
  - {pattern: "model.layers.?", kind: layers}
batches: {files: [text.txt], batch: 4, sequence: 16, tokenizer: bytes}
device: cpu
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model over bytes."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    (folder / "text.txt").write_text(TEXT)
    (folder / "score.yaml").write_text(CONFIG)
    return folder / "score.yaml"


def _plain(model: Path, config: Path, out: Path, *more: str) -> tuple[int, str]:
    arguments = ["score", str(model), "--config", str(config), "--out", str(out), *more]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def plain(model: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process finds."""
    out = tmp_path_factory.mktemp("plain") / "out"
    code, output = _plain(model, config, out)
    assert code == 0, output
    assert "model.layers.1.mlp.down_proj" in output
    return out


def _started(*arguments: str) -> tuple[list[subprocess.Popen[str]], TCPStore]:
    """Two ranks, as torchrun starts them, but that nobody ends but themselves."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here already
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "NO_COLOR": "1",
        "PYTHONPATH": str(ROOT),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "flex_model", "score", *arguments],
            env={**told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    return ranks, store


def _ended(ranks: Sequence[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    try:
        output = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], output


def _on_ranks(model: Path, config: Path, out: Path, *more: str) -> tuple[list[int], list[str]]:
    ranks, _store = _started(str(model), "--config", str(config), "--out", str(out), *more)
    return _ended(ranks)


def _assert_close(out: Path, due: Path) -> None:
    found, expected = load_scores(out), load_scores(due)
    assert found.keys() == expected.keys()
    for key, named in expected.items():
        for name, values in named.items():
            scale = float(values.abs().max()) if values.is_floating_point() else 0.0
            torch.testing.assert_close(found[key][name], values, rtol=0, atol=1e-5 * scale)


def test_what_is_written(plain: Path) -> None:
    assert {path.name for path in plain.iterdir()} == {
        "rank_0.safetensors", "args.json", "channel_importance_results.json",
        "scores.safetensors", "scores.png", "scores.html",
    }  # fmt: skip
    args = json.loads((plain / "args.json").read_text())
    assert args["batches"]["sequence"] == 16
    assert args["eval_samples"] == len(TEXT) // 16
    page = (plain / "scores.html").read_text()
    assert "data:image/png;base64," in page
    assert "model.layers.0.self_attn.o_proj" in page
    assert "http" not in page  # it loads nothing
    assert (plain / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert "model.layers.0.self_attn.o_proj#heads" in load_scores(plain)


def test_scores_for_pruning(plain: Path) -> None:
    """One vector by module name: the first kind's; layers and norms put together."""
    found = load_file(plain / "scores.safetensors")
    by_rank = load_scores(plain)
    assert not any("#" in name for name in found)
    kv = by_rank["model.layers.0.self_attn.o_proj#kv_heads"]["score"]
    assert torch.equal(found["model.layers.0.self_attn.o_proj"], kv)
    assert found["layers"].shape == (2,)
    norms = [named["score"] for key, named in by_rank.items() if key.endswith("layernorm#hidden")]
    norms += [by_rank[f"model.layers.{n}.post_attention_layernorm"]["score"] for n in range(2)]
    torch.testing.assert_close(found["hidden"], torch.stack(norms).sum(0))


def test_pruning_takes_the_scores(model: Path, plain: Path) -> None:
    """Every dimension that was scored, under the names and shapes that are asked for."""
    sizes = (
        "--ffn-ratio",
        "0.25",
        "--kv-heads-ratio",
        "0.5",
        "--hidden-size",
        "12",
        "--layers-size",
        "1",
    )
    scores = ["--scores", str(plain / "scores.safetensors")]
    done = CliRunner().invoke(app, ["prune", str(model), *scores, *sizes, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "intermediate_size = 18" in done.output


def test_the_documented_config_works(model: Path, tmp_path: Path) -> None:
    """On this model, which is over bytes and has a short context."""
    told = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "scoring.md").read_text(), re.DOTALL)
    assert told is not None
    text = (
        told[1]
        .replace("sequence: 512", "sequence: 16")
        .replace("tokenizer: auto", "tokenizer: bytes")
    )
    (tmp_path / "score.yaml").write_text(text.replace("device: auto", "device: cpu"))
    (tmp_path / "text.txt").write_text(TEXT)
    code, output = _plain(model, tmp_path / "score.yaml", tmp_path / "out")
    assert code == 0, output


def test_tensor_parallel_and_killed(model: Path, config: Path, plain: Path, tmp_path: Path) -> None:
    """On two ranks; once more with one rank killed in the midst; and that one started again."""
    codes, output = _on_ranks(model, config, tmp_path / "whole")
    assert codes == [0, 0], output
    assert "model.layers.1.mlp.down_proj" in output[0]
    assert output[1] == ""
    _assert_close(tmp_path / "whole", plain)

    state = ["--checkpoint", str(tmp_path / "state"), "--every", "1"]
    arguments = [str(model), "--config", str(config), "--out", str(tmp_path / "again"), *state]
    ranks, _store = _started(*arguments)
    _wait_for(tmp_path / "state", ranks)
    ranks[0].kill()
    codes, output = _ended(ranks)
    assert codes == [-9, 2], output
    assert "another rank failed: " in output[1]
    assert not (tmp_path / "again").exists()

    codes, output = _on_ranks(model, config, tmp_path / "again", *state)
    assert codes == [0, 0], output
    whole, again = (load_scores(tmp_path / name) for name in ("whole", "again"))
    for key, named in whole.items():
        for name, values in named.items():
            assert torch.equal(again[key][name], values), key


def _wait_for(state: Path, ranks: Sequence[subprocess.Popen[str]]) -> None:
    """Until some batches are done."""
    deadline = time.monotonic() + 100
    while not list(state.glob("step_*[3-9]/manifest.json")):
        assert time.monotonic() < deadline
        assert all(rank.poll() is None for rank in ranks), "ended before it could be killed"
        time.sleep(0.005)


def test_data_parallel(model: Path, config: Path, tmp_path: Path) -> None:
    """Against one process whose batches are the two ranks' together."""
    text = config.read_text().replace("batch: 4", "batch: 8")
    (config.parent / "both.yaml").write_text(text)
    code, output = _plain(model, config.parent / "both.yaml", tmp_path / "one")
    assert code == 0, output
    codes, outputs = _on_ranks(model, config, tmp_path / "two", "--dp", "2")
    assert codes == [0, 0], outputs
    _assert_close(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("kind: iterative", "kind: l3", "no kind of hook 'l3'"),
        ("mlp.down_proj", "mlp.dwn_proj", r"Nearest: model.layers.\d.mlp.down_proj"),
        ("files: [text.txt]", "files: [none.txt]", "none.txt cannot be read"),
        ("batch: 4", "batch: 0", "batches.batch must be 1 or more"),
        ("batch: 4", "size: 4", "'size' not in 'BatchConfig'"),
        ("sequence: 16", "sequence: 9999", "no sequence of 9999 tokens"),
        ("device: cpu", "dtype: float8", "dtype is one of"),
        ("tokenizer: bytes", "tokenizer: auto", "no tokenizer that can be loaded"),
        ("targets:", "targets: [", "cannot be used"),
    ],
)
def test_configs_that_are_refused(
    old: str, new: str, told: str, model: Path, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "bad.yaml").write_text(config.read_text().replace(old, new))
    code, output = _plain(model, tmp_path / "bad.yaml", tmp_path / "out")
    assert code == 2, output
    assert re.search(told, output.replace("\n", "")), output
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_run_is_refused_before_the_run(
    model: Path, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "rank_3.safetensors").write_bytes(b"")
    code, output = _plain(model, config, tmp_path)
    assert code == 2
    assert "rank_3.safetensors" in output


def test_no_model_and_sizes_that_do_not_fit(model: Path, config: Path, tmp_path: Path) -> None:
    code, output = _plain(tmp_path, config, tmp_path / "out")
    assert code == 2
    assert "no config.json" in output
    code, output = _plain(model, config, tmp_path / "out", "--tp", "2")
    assert code == 2
    assert "need 2 ranks, but the job has 1" in output


# -- token files -------------------------------------------------------------------------------


def _bytes(text: str) -> list[int]:
    return list(text.encode())


def test_files_of_token_ids(tmp_path: Path) -> None:
    rows = torch.arange(12).view(3, 4)
    mask = torch.ones(3, 4, dtype=torch.int64)
    mask[0, :2] = 0
    np.save(tmp_path / "stream.npy", np.arange(10, dtype=np.uint16))
    save_file({"input_ids": rows, "attention_mask": mask}, tmp_path / "rows.safetensors")
    (tmp_path / "text.txt").write_text("abcdefg")
    names = ("stream.npy", "rows.safetensors", "text.txt")
    found = read_tokens([tmp_path / name for name in names], 4, _bytes)
    due = [[0, 1, 2, 3], [4, 5, 6, 7], *rows.tolist(), [97, 98, 99, 100]]
    assert found.ids.tolist() == due
    assert found.mask is not None
    assert found.mask.sum(1).tolist() == [4, 4, 2, 4, 4, 4]


def _file(folder: Path, content: Any) -> Path:
    path = folder / "ids.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    return path


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"input_ids": torch.ones(2, 5, dtype=torch.int64)}, "sequences of 5 tokens"),
        ({"input_ids": torch.ones(2, 4)}, "torch.float32"),
        ({"a": torch.ones(2), "b": torch.ones(2)}, r"\['a', 'b'\]"),
        ({"input_ids": torch.ones(2, 4).int(), "attention_mask": torch.ones(8).int()}, r"\(8,\)"),
        (b"no such thing", "cannot be read"),
    ],
)
def test_files_that_are_something_else(content: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=told):
        read_tokens([_file(tmp_path, content)], 4, _bytes)


def _all_ids(found: list[TokenBatches], number: int) -> Tensor:
    return torch.cat([list(batches)[number]["input_ids"] for batches in found])


@pytest.mark.parametrize(("sequences", "batches", "last"), [(16, 2, 8), (19, 3, 3), (17, 2, 8)])
def test_ranks_share_out_the_sequences(sequences: int, batches: int, last: int) -> None:
    """In order, each once; of one sequence too few for two ranks none is used."""
    tokens = Tokens(torch.arange(sequences).view(-1, 1))
    found = [TokenBatches(tokens, 4, rank, 2) for rank in range(2)]
    assert [len(own) for own in found] == [batches, batches]
    together = torch.cat([_all_ids(found, number) for number in range(batches)])
    assert together.flatten().tolist() == list(range(8 * (batches - 1) + last))
    assert found[0].sequences == len(together)


def test_a_limit() -> None:
    tokens = Tokens(torch.arange(9).view(-1, 1))
    assert len(list(TokenBatches(tokens, 2, limit=3))) == 3
    assert TokenBatches(tokens, 2, limit=3).sequences == 6
    assert len(list(TokenBatches(tokens, 2, limit=30))) == 5
