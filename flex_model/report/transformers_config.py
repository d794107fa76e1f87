"""A transformers model from its config alone: no weights, and as its ``tp_plan`` shards it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flex_model.errors import ConfigurationError

__all__ = ["from_config"]

_ATTENTION = "flex_model_plan"


def from_config(
    path: Path, dtype: torch.dtype, tp: int, dp: int, fakes: FakeTensorMode
) -> nn.Module:
    """The model on this rank, of tensors without values.

    What ``from_pretrained`` does between building a model and reading its weights, but for FSDP:
    it cuts parameters, and the batch is cut over data-parallel ranks with it or without.

    Args:
        path: a ``config.json``, or a directory with one.
        dtype: of parameters and activations.
        tp: tensor-parallel ranks.
        dp: data-parallel ranks.
        fakes: entered for what makes tensors; a mesh holds its ranks in a real one.

    Raises:
        ConfigurationError: no such config, or one whose model has no plan that fits.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigurationError(f"There is no config {file}.")
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # Without a mask, as sequences without padding have it; of fake ids transformers would make one.
    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    config: Any = AutoConfig.from_pretrained(file, local_files_only=True)
    config.use_cache = False
    with fakes:
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=_ATTENTION
        )
    if tp * dp > 1:
        _spread(model, tp, dp, fakes)
    return model.eval()


def _spread(model: Any, tp: int, dp: int, fakes: FakeTensorMode) -> None:
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism
    from transformers.distributed.utils import initialize_distributed_mesh

    spread = DistributedConfig(tp_size=tp, dp_replicate_size=dp)
    _, manager = initialize_distributed_mesh(spread)
    model.config.distributed_config = spread
    model._mesh_manager = manager
    model._device_mesh = manager.get_mesh(("pp", "fsdp", "tp"))
    model._tp_size, model._fsdp_size = tp, 1
    layers_alone = copy.copy(spread)
    layers_alone.dp_replicate_size = 1
    try:
        plan, _, _ = model._resolve_parallel_plans(layers_alone)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    if tp > 1:
        with fakes:
            apply_tensor_parallelism(model, manager.get_mesh("tp"), plan)
