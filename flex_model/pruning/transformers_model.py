"""A transformers model from its folder, in the dtype that it was saved in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from flex_model.errors import PruningError

__all__ = ["from_folder"]


def from_folder(folder: Path, ranks: int) -> nn.Module:
    """The model, whole or (on several ranks) this rank's part of it by its ``tp_plan``.

    Raises:
        PruningError: there is no model that can be loaded.
    """
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    spread: dict[str, Any] = {}
    if ranks > 1:
        spread["distributed_config"] = DistributedConfig(tp_plan="auto", tp_size=ranks)
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, **spread
        )
    except (OSError, ValueError) as error:
        raise PruningError(f"{folder} holds no model that can be loaded: {error}") from error
    return model.eval()
