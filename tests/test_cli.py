"""The command ``flex-model``, as it is run."""

import configparser
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from flex_model.cli import app

ROOT = Path(__file__).parent.parent
# A wide page: lines in a table are not folded.
WIDE = {"COLUMNS": "400", "TERMINAL_WIDTH": "400", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def _ran(ranks: int, *arguments: str) -> tuple[int, str]:
    """The command on so many ranks of torchrun, or without it: its exit code and output."""
    program = [sys.executable]
    if ranks:
        program += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        interface = {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
    else:
        interface = {}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [*program, "-m", "flex_model", *arguments],
        env={**os.environ, **WIDE, **interface, "PYTHONPATH": path},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def _verdicts(output: str) -> dict[str, str]:
    """The table's rows: what was found by hook."""
    words = "EXACT|DEGRADED|WRONG|UNCHECKED"
    return dict(re.findall(rf"^  (\(no hook\)|\S+) +((?:{words}).*)$", output, re.MULTILINE))


def _words(output: str) -> dict[str, str]:
    return {hook: found.split()[0] for hook, found in _verdicts(output).items()}


def test_setup_names_the_command() -> None:
    """Catches an entry point that leads nowhere, or a command that is installed without typer."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    entry = setup["options.entry_points"]["console_scripts"].strip()
    name, _, target = (part.strip() for part in entry.partition("="))
    module, _, function = target.partition(":")
    assert name == "flex-model"
    assert isinstance(getattr(importlib.import_module(module), function), typer.Typer)
    assert "typer>=" in setup["options"]["install_requires"]


def test_a_sound_model_passes() -> None:
    """Catches a check that sees faults where there are none, or that misses a refusal."""
    code, output = _ran(2, "check", "user_models:right", "--all")
    exact = ("(no hook)", "up", "act", "down", "head")
    degraded = ("embed", "own_up", "own_down")
    due = dict.fromkeys(exact, "EXACT") | dict.fromkeys(degraded, "DEGRADED")
    assert _words(output) == due, output
    assert code == 0, output
    found = _verdicts(output)
    assert "torch offers no pre-hook edit, no backward hook here" in found["embed"]
    assert "capture, edit, local edit, backward-pre hook, random edit needs" in found["own_up"]
    assert "expected_shape: LayoutError: own_up" in found["own_up"]


def test_features_in_another_order_are_wrong() -> None:
    """Catches a check that only compares what the model puts out, which is right here."""
    code, output = _ran(2, "check", "user_models:swapped", "up", "head")
    assert _words(output) == {"(no hook)": "EXACT", "up": "WRONG", "head": "EXACT"}, output
    assert "record off by" in _verdicts(output)["up"]
    assert code == 1
    # Every rank ended by itself, with this code: none was left to be ended by torchrun.
    assert not re.search(r"exitcode *: -", output), output


def test_other_weights_are_wrong() -> None:
    """Catches a comparison of the ranks with themselves."""
    code, output = _ran(2, "check", "user_models:other_weights", "up")
    assert _words(output) == {"(no hook)": "WRONG", "up": "WRONG"}, output
    assert code == 1


def test_data_parallel_ranks_have_a_part_of_the_batch_each() -> None:
    """Catches ranks that are all given the same, or gradients of another loss."""
    code, output = _ran(2, "check", "user_models:copied", "up", "--dp", "2")
    assert _words(output) == {"(no hook)": "EXACT", "up": "EXACT"}, output
    assert code == 0


def test_a_rank_that_cannot_build_its_part_ends_all() -> None:
    """Catches the other ranks waiting for it, in what they build together."""
    _, output = _ran(2, "check", "user_models:raises_on_one_rank", "up")
    assert "error: The sharded model: rank 1: ValueError: no weights for this rank" in output
    assert re.search(r"exitcode *: 2", output), output


def test_a_hook_that_does_not_exist_ends_all_ranks() -> None:
    """Catches a rank that goes on alone."""
    _, output = _ran(2, "check", "user_models:right", "model.up")
    assert "has no module 'model.up'. The nearest are: own_up, up" in output
    assert re.findall(r"exitcode +: (-?\d+) \(pid", output) == ["2", "2"], output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["user_models:none_such", "up"], "user_models has no function 'none_such'"),
        (["no_such_module:right", "up"], "There is no module no_such_module"),
        (["no/such/directory", "up"], "There is no directory no/such/directory"),
        (["user_models:no_module", "up"], "returned str, no nn.Module"),
        (["user_models:right", "up", "--tp", "2"], "tp=2 x dp=1 need 2 ranks"),
        (["user_models:right", "up", "--pp", "2"], "Leave --pp and --cp at 1"),
        (["user_models:right"], "give names of modules, or --all"),
        (["user_models:right", "up", "--all"], "give names of modules, or --all"),
    ],
    ids=["function", "module", "directory", "no module", "ranks", "pipeline", "none", "both"],
)
def test_what_does_not_exist_is_named(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback in place of an answer, or a check of nothing that passes."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which the command changes
    done = CliRunner().invoke(app, ["check", *arguments], env=WIDE)
    assert done.exit_code == 2, done.output
    assert message in done.output


def test_a_transformers_directory_is_checked(tmp_path: Path) -> None:
    """Catches a directory whose sharded model is not that of its tp_plan."""
    from frameworks.transformers_llama import _filled

    _filled(kv_heads=2).save_pretrained(tmp_path)
    code, output = _ran(2, "check", str(tmp_path), "model.layers.0.mlp.act_fn")
    due = {"(no hook)": "EXACT", "model.layers.0.mlp.act_fn": "EXACT"}
    assert _words(output) == due, output
    assert code == 0
