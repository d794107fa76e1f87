"""``flex-model plan``: layouts and costs from a config alone, against the model run for real."""

import time
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaConfig
from typer.testing import CliRunner

from flex_model import FlexModel, HookFunction
from flex_model.cli import app
from flex_model.loading.transformers_model import from_directory
from flex_model.report.plan import cost_of, imagined, plan
from flex_model.testing.ranks import run_ranks
from frameworks.transformers_llama import _filled
from traffic import Counting

BATCH, SEQUENCE = 3, 10
# A name, the kind of hook, and which of the tensors.
HOOKS = (
    ("model.embed_tokens", "forward", 0),
    ("model.rotary_emb", "forward", 1),
    ("model.layers.0", "forward", 0),
    ("model.layers.0.self_attn.k_proj", "forward", 0),
    ("model.layers.0.self_attn.o_proj", "forward_pre", 0),
    ("model.layers.1.mlp", "forward", 0),
    ("model.layers.1.mlp.act_fn", "forward", 0),
    ("lm_head", "forward", 0),
)


def _scaled(module, value, save_ctx, modules):
    return value * modules["gain"].weight.sum()  # trains, so gradients come wherever it is


def _counted(called, ids):
    with Counting() as forward:
        loss = called(ids).logits.sum()
    with Counting() as backward:
        loss.backward()
    return forward.seen, backward.seen


def _on_top(seen, bare):
    """What a hook adds: the bytes of its collectives, all of which have a rule."""
    more = Counter(seen)
    more.subtract(bare)
    assert all(received is not None for (_, received), count in more.items() if count)
    return sum(received * count for (_, received), count in more.items() if count)


def _measured(folder, tp, dp):
    """Bytes that this rank receives for a capture, an edit and its backward, by hook."""
    module = from_directory(folder, tp, dp)
    # Differs from rank to rank of dp, and in no length from the plan's.
    ids = torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE) + dist.get_rank() // tp
    _counted(module, ids)
    bare = _counted(module, ids)
    found = {}
    for name, kind, index in HOOKS:
        for edit in (None, _scaled):
            flex = FlexModel(module, {}, data_parallel_size=dp)
            with flex:
                flex.register_trainable_module("gain", nn.Linear(1, 1))
                hook = HookFunction(name, None, edit, index, record=edit is None)
                getattr(flex, f"register_{kind}_hook")(hook)
                _counted(flex, ids)  # the first compares the ranks
                seen = _counted(flex, ids)
            found[name, edit is None] = tuple(map(_on_top, seen, bare))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    _filled(kv_heads=2).save_pretrained(path)
    return path


def _total(collectives):
    return sum(collective.received for collective in collectives)


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (2, 2)], ids=["2 ranks", "4 ranks"])
def test_bytes_are_those_of_the_real_thing(folder, tp, dp):
    """Catches a plan of layouts, or of costs, that ranks do not have."""
    by_rank = run_ranks(_measured, tp * dp, str(folder), tp, dp, timeout=200)
    found = plan(folder, {"dp": dp, "tp": tp}, torch.float32, BATCH, SEQUENCE)
    planned = {(b.module, b.kind, b.index): b for b in found.boundaries}
    ranges = 0
    for name, kind, index in HOOKS:
        cost = cost_of(planned[name, kind, index])
        capture = [sum(rank[name, True][way] for rank in by_rank) for way in (0, 1)]
        edit = [sum(rank[name, False][way] for rank in by_rank) for way in (0, 1)]
        assert capture == [_total(cost.capture), 0], name
        assert edit[0] == _total(cost.edit), name
        assert edit[1] in {_total(cost.backward), _total(cost.backward_most)}, name
        ranges += _total(cost.backward) != _total(cost.backward_most)
    assert 0 < ranges < len(HOOKS) / 2  # most are told to the byte
    assert all(boundary.layout is not None for boundary in found.boundaries)


def test_a_thousand_ranks_take_seconds(tmp_path):
    """Catches a plan that makes a group, or a tensor, for each rank or layer anew."""
    LlamaConfig(num_hidden_layers=24, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    start = time.process_time()
    found = plan(tmp_path, {"dp": 128, "tp": 8}, torch.bfloat16, 2, 64)
    assert time.process_time() - start < 20
    wide = next(b for b in found.boundaries if b.module == "model.layers.23.mlp.act_fn")
    assert wide.whole == (256, 64, 11008)
    assert not dist.is_initialized()


def test_imagined_ranks_carry_a_flex_model():
    """Catches a FlexModel that waits for ranks that nobody is, or compares values with theirs."""
    with imagined(8):
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
        records = {}
        with FlexModel(model, records, mesh=mesh) as flex:
            flex.register_forward_hook(HookFunction("1"))
            flex(torch.ones(3, 4))
        assert [record.shape for record in records["1"]] == [(6, 8)]


def _printed(*arguments):
    done = CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "250"})
    return done.exit_code, done.output


def test_the_command_prints_layouts_and_costs(folder):
    """Catches a tree without layouts, layers that are printed one by one, a hook without a cost."""
    sizes = ("--tp", 2, "--dp", 2, "--dtype", "fp32", "--batch", BATCH, "--sequence", SEQUENCE)
    code, output = _printed(folder, "model.layers.0.mlp.act_fn", *sizes)
    assert code == 0, output
    assert "0 to 1 LlamaDecoderLayer" in output
    assert "out 3x10x20 of 6x10x40, dp(2): S(0), tp(2): S(2)" in output
    # 2,400 B on a rank: to one rank 2 x 2,400 over tp and 4,800 over dp; to all 4 x (2,400 + 4,800)
    row = next(line for line in output.splitlines() if "model.layers.0.mlp.act_fn  " in line)
    assert "9.38 KiB" in row
    assert "28.1 KiB" in row
    code, output = _printed(folder / "config.json", "--all", "--tp", 2)
    assert code == 0, output
    assert "model.layers.*.mlp.act_fn (input)" in output
    assert "model.layers.1.mlp.act_fn" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lm_heat"], "no module 'lm_heat'. The nearest that it calls are: lm_head"),
        (["lm_head", "--all"], "give names of modules, or --all"),
        (["--pp", "2"], "tells of no stages"),
        (["--dp", "2048"], "2048 ranks are more than 1024"),
        (["--tp", "2"], "no `tp_plan`"),
    ],
    ids=["hook", "both", "pipeline", "ranks", "no plan"],
)
def test_what_cannot_be_planned_is_named(folder, tmp_path, arguments, message):
    if message == "no `tp_plan`":
        config = (folder / "config.json").read_text().replace('"llama"', '"gpt2"')
        (tmp_path / "config.json").write_text(config.replace("LlamaFor", "GPT2LMHead"))
        folder = tmp_path
    code, output = _printed(folder, *arguments)
    assert code == 2, output
    assert message in " ".join(output.replace("│", " ").split()), output


def test_a_missing_config_is_named(tmp_path):
    code, output = _printed(tmp_path / "nothing")
    assert code == 2, output
    assert "There is no config" in output
