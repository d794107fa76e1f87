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
from torch.distributed import TCPStore
from typer.testing import CliRunner

from flex_model.cli import app

ROOT = Path(__file__).parent.parent
# A wide page: lines in a table are not folded.
WIDE = {"COLUMNS": "400", "TERMINAL_WIDTH": "400", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, **WIDE, **LOOPBACK, "PYTHONPATH": path}


def _ran(*arguments: str) -> tuple[list[int], str]:
    """``check`` on two ranks that nobody ends but themselves: exit codes, and all they print."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here already
        "WORLD_SIZE": "2",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "flex_model", "check", *arguments],
            env={**_environment(), **told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        output = "".join(rank.communicate(timeout=240)[0] for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], output


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
    codes, output = _ran("user_models:right", "--all")
    exact = ("(no hook)", "up", "act", "down", "head")
    degraded = ("embed", "own_up", "own_down")
    due = dict.fromkeys(exact, "EXACT") | dict.fromkeys(degraded, "DEGRADED")
    assert _words(output) == due, output
    assert codes == [0, 0], output
    found = _verdicts(output)
    assert "torch offers no pre-hook edit, no backward hook here" in found["embed"]
    made = "made with expected_shape only: LayoutError: own_up"
    assert f"capture, edit, local edit, backward-pre hook, random edit: {made}" in found["own_up"]


def test_features_in_another_order_are_wrong() -> None:
    """Catches a check that only compares what the model puts out, which is right here."""
    codes, output = _ran("user_models:swapped", "up", "head")
    assert _words(output) == {"(no hook)": "EXACT", "up": "WRONG", "head": "EXACT"}, output
    assert "record off by" in _verdicts(output)["up"]
    assert codes == [1, 1]


def test_other_weights_are_wrong() -> None:
    """Catches a comparison of the ranks with themselves."""
    codes, output = _ran("user_models:other_weights", "up")
    assert _words(output) == {"(no hook)": "WRONG", "up": "WRONG"}, output
    assert codes == [1, 1]


def test_data_parallel_ranks_have_a_part_of_the_batch_each() -> None:
    """Catches ranks that are all given the same, or gradients of another loss."""
    codes, output = _ran("user_models:copied", "up", "--dp", "2")
    assert _words(output) == {"(no hook)": "EXACT", "up": "EXACT"}, output
    assert codes == [0, 0]


def test_a_rank_that_cannot_build_its_part_ends_all() -> None:
    """Catches the other ranks waiting for it, in what they build together."""
    codes, output = _ran("user_models:raises_on_one_rank", "up")
    assert "error: The sharded model: rank 1: ValueError: no weights for this rank" in output
    assert codes == [2, 2]


def test_a_hook_that_does_not_exist_ends_all_ranks() -> None:
    """Catches a rank that goes on alone."""
    codes, output = _ran("user_models:right", "model.up")
    assert "has no module 'model.up'. The nearest are: own_up, up" in output
    assert codes == [2, 2]


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
    """Catches a directory whose sharded model is not that of its tp_plan, under torchrun."""
    from frameworks.transformers_llama import _filled

    _filled(kv_heads=2).save_pretrained(tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "flex_model", "check", str(tmp_path), "model.layers.0.mlp.act_fn"],
        env=_environment(), capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    due = {"(no hook)": "EXACT", "model.layers.0.mlp.act_fn": "EXACT"}
    assert _words(done.stdout) == due, done.stderr
    assert done.returncode == 0
