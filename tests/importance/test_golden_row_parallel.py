"""The reference's numbers of a whole layer, on Megatron's RowParallelLinear cut over two ranks.

The reference raises there; what it gives on the whole layer is what is due.
"""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from golden_cases import GOLDEN
from safetensors.torch import load_file
from torch import Tensor, nn

from flex_model.importance import (
    ForwardHook,
    IndependentChannelContributionHook,
    IndependentKvHeadContributionHook,
    IterativeChannelContributionHook,
    MegatronL2NormHook,
)
from flex_model.testing.ranks import run_ranks


def _cases(index: str, word: str) -> list[Any]:
    found = json.loads((GOLDEN / index).read_text())["cases"]
    return [pytest.param(c, id=c["case"]) for c in found if word in c["case"]]


def _layer(weight: Tensor) -> Any:
    """This rank's columns of a layer without bias, which returns ``(output, None)``."""
    from megatron.core.tensor_parallel import RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    outputs, inputs = weight.shape
    ranks = dist.get_world_size()
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=4,
        tensor_model_parallel_size=ranks, use_cpu_initialization=True,
    )  # fmt: skip
    layer = RowParallelLinear(
        inputs, outputs, config=config, init_method=nn.init.zeros_, bias=False,
        input_is_parallel=True, skip_bias_add=False,
    )  # fmt: skip
    with torch.no_grad():
        layer.weight.copy_(weight.chunk(ranks, 1)[dist.get_rank()])
    return layer


def _hook(kind: str, layer: nn.Module, made: dict[str, Any], method: str | None) -> ForwardHook:
    if kind.startswith("Independent") and "Kv" in kind:
        config = SimpleNamespace(
            num_attention_heads=made["num_attention_heads"],
            head_dim=made["head_dim"],
            hidden_size=made["hidden_size"],
        )
        attention = SimpleNamespace(num_key_value_heads=made["num_key_value_heads"])
        return IndependentKvHeadContributionHook(
            layer,
            {
                "model": SimpleNamespace(config=config),
                "block_config": SimpleNamespace(attention=attention),
            },
        )
    if kind.startswith("Independent"):
        return IndependentChannelContributionHook(layer)
    kwargs = {
        "validation_full_iters": made["validation_full_iters"],
        "calibration_method": method,
    }
    return IterativeChannelContributionHook(layer, kwargs)


def _at_two_ranks(case: dict[str, Any]) -> dict[str, Tensor]:
    from frameworks.megatron_cpu import model_parallel

    given = load_file(GOLDEN / "tp2.safetensors")
    method = "scale_by_magnitude" if case["hook"].endswith("scale_by_magnitude") else None
    with model_parallel(2), torch.no_grad():
        layer = _layer(given[case["weight_full"]])
        hook = _hook(case["hook"], layer, case["constructor"], method)
        layer.register_forward_hook(hook)
        for number, key in enumerate(case[f"inputs_rank{dist.get_rank()}"]):
            output, _ = layer(given[key])
            torch.testing.assert_close(
                output, given[case["outputs_full"][number]], rtol=1e-4, atol=1e-5
            )
        return hook.to_dict()


@pytest.mark.parametrize("case", _cases("index_tp2.json", "tp2_unsupported"))
def test_two_ranks(case: dict[str, Any]) -> None:
    due = load_file(GOLDEN / "tp2.safetensors")
    for found in run_ranks(_at_two_ranks, 2, case):
        for name, key in case["expected_unsharded"].items():
            if due[key].is_floating_point():
                torch.testing.assert_close(
                    found[name], due[key], rtol=case["rtol"], atol=case["atol"]
                )
            else:
                assert torch.equal(found[name], due[key]), name


def _at_one_rank(case: dict[str, Any]) -> dict[str, Tensor]:
    from frameworks.megatron_cpu import model_parallel

    given = load_file(GOLDEN / "tp1.safetensors")
    with model_parallel(1), torch.no_grad():
        layer = _layer(given[case["weight"]])
        hooks = {
            "iterative": _hook("Iterative", layer, case, case["calibration_method"]),
            "independent": _hook("Independent", layer, case, None),
            "megatron_l2": MegatronL2NormHook(),
        }
        for hook in hooks.values():
            layer.register_forward_hook(hook)
        for key in case["inputs"]:
            layer(given[key])
        return {
            f"{name}.{key}": value
            for name, hook in hooks.items()
            for key, value in hook.to_dict().items()
        }


@pytest.mark.parametrize("case", _cases("index_tp1.json", "rpl_tp1"))
def test_one_rank(case: dict[str, Any]) -> None:
    due = load_file(GOLDEN / "tp1.safetensors")
    (found,) = run_ranks(_at_one_rank, 1, case)
    for name, key in case["expected"].items():
        torch.testing.assert_close(
            found[name], due[key], rtol=case["rtol"], atol=case["atol"], check_dtype=False
        )
