"""The rows of the parity grid by name; a row's framework is imported when the row is asked for."""

import warnings
from importlib import import_module

from flex_model.testing.case import Case

_ROWS_BY_MODULE = {
    "fairscale_llama": ("fairscale", "fairscale tp x dp"),
    "megatron_gpt": ("megatron", "megatron 1 kv head", "megatron sequence", "megatron tp x dp"),
    "dtensor_llama": ("dtensor", "dtensor hooked first", "dtensor sequence", "dtensor tp x dp"),
    "transformers_llama": ("transformers", "transformers 1 kv head", "transformers tp x fsdp"),
    "uneven_mlp": ("dtensor uneven", "dtensor uneven sequence", "dtensor uneven empty"),
    "ddp_llama": ("ddp", "ddp x tp"),
    "megatron_pipeline": ("megatron pp", "megatron pp x tp", "megatron pp x sequence"),
    "pipelining_llama": ("pipelining gpipe", "pipelining 1f1b", "pipelining pp x dp"),
    "context_llama": ("context", "context x dp"),
    "megatron_moe": (
        "megatron moe",
        "megatron moe alltoall",
        "megatron moe idle",
        "megatron moe ep x dp",
    ),
    "transformers_moe": (
        "transformers moe",
        "transformers moe idle",
        "transformers moe ep x fsdp",
        "transformers moe tp x fsdp",
    ),
    "accelerate_llama": (
        "accelerate prepare",
        "accelerate device map",
        "accelerate device map x dp",
    ),
    "fsdp_llama": (
        "fsdp1",
        "fsdp1 flat",
        "fsdp1 hybrid",
        "fsdp2",
        "fsdp2 hybrid",
        "fsdp2 x tp",
    ),
}
_MODULES = {name: module for module, names in _ROWS_BY_MODULE.items() for name in names}

ROW_NAMES = tuple(_MODULES)


def row(name: str) -> Case:
    """The case of that name, with its framework imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron tells of each optional package it misses
        cases = import_module(f"frameworks.{_MODULES[name]}").CASES
    return next(case for case in cases if case.name == name)
