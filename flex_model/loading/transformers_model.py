"""A transformers model from its directory: whole, or this rank's part by its ``tp_plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from flex_model.errors import ConfigurationError

__all__ = ["from_directory", "tokenizer_of"]


def from_directory(
    directory: str | Path,
    tp: int = 1,
    dp: int = 1,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    caching: bool = False,
) -> nn.Module:
    """The model on the CPU, or on the job's accelerator; over data-parallel ranks it is replicated.

    Args:
        directory: with ``config.json`` and the weights.
        tp: ranks that the plan's layers are spread over.
        dp: ranks with a part of the batch each.
        dtype: of the parameters; "auto" takes the one that they were saved in.
        caching: whether the config keeps what it says of caches.
    """
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    spread: dict[str, Any] = {}
    if tp * dp > 1:
        plan = "auto" if tp > 1 else None
        spread["distributed_config"] = DistributedConfig(
            tp_plan=plan, tp_size=tp, dp_replicate_size=dp
        )
    module: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, local_files_only=True, **spread
    )
    if not caching:
        module.config.use_cache = False
    return module


def tokenizer_of(directory: str) -> Any:
    """The tokenizer beside a model.

    Raises:
        ConfigurationError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigurationError(
            f"There is no tokenizer that can be loaded in {directory} ({first}). Give token ids in "
            "place of text."
        ) from error
