"""The demo's job, on one process and on two ranks, as `scripts/demo` launches it."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

import byte_llama
from byte_llama import Recipe
from demo_job.launch import run
from demo_job.report import report


@pytest.fixture(autouse=True)
def _scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(byte_llama.__file__).parent))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = Recipe(hidden=32, intermediate=64, heads=4, key_value_heads=2, steps=2)
    return byte_llama.byte_llama(tmp_path_factory.mktemp("model"), small)


def test_ranks_agree_with_one_process(model: Path, tmp_path: Path) -> None:
    one, two, shown = tmp_path / "one", tmp_path / "two", StringIO()
    console = Console(file=shown, width=80)
    with Progress(console=console) as progress:
        run(1, model, one, progress)
        run(2, model, two, progress)

    assert report(console, one, two), shown.getvalue()
    results = json.loads((two / "results.json").read_text())
    assert results["local_shapes"]["model.layers.0.mlp.act_fn"][-1] == 32  # of 64
    assert results["texts"]["before"] != results["texts"]["after"]
    assert results["probe_losses"][-1] < 0.9 * results["probe_losses"][0]

    results["probe_losses"][-1] *= 1.001
    (two / "results.json").write_text(json.dumps(results))
    assert not report(console, one, two)


def test_a_failing_job_shows_its_error(tmp_path: Path) -> None:
    with Progress(console=Console(file=StringIO())) as progress, pytest.raises(SystemExit) as error:
        run(2, tmp_path / "nowhere", tmp_path / "output", progress)
    assert "nowhere" in str(error.value)
    assert "The job on 2 ranks failed" in str(error.value)
