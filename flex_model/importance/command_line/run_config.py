"""What ``flex-model score`` is told in a file: YAML that OmegaConf reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from flex_model.errors import ImportanceError
from flex_model.importance.run.targets import Target

__all__ = ["BatchConfig", "RunConfig", "TargetConfig", "read_config", "targets_of"]

_DTYPES = ("float32", "bfloat16", "float16")
_TOKENIZERS = ("auto", "bytes")
_DEVICES = ("auto", "cpu")


@dataclass
class TargetConfig:
    """See `Target`."""

    pattern: str = MISSING
    kind: str = MISSING
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class BatchConfig:
    """What is run.

    Attributes:
        files: of text or token ids (see `read_tokens`); relative ones lie beside the config.
        batch: sequences on each data-parallel rank.
        sequence: tokens of each.
        limit: batches at most; None for all.
        tokenizer: "auto" for the model's own, "bytes" for models over bytes.
    """

    files: list[str] = MISSING
    batch: int = 8
    sequence: int = 512
    limit: int | None = None
    tokenizer: str = "auto"


@dataclass
class RunConfig:
    """A run.

    Attributes:
        targets: what is scored.
        batches: by what.
        dtype: the model is loaded in.
        device: "auto" takes accelerators where there are some.
    """

    targets: list[TargetConfig] = MISSING
    batches: BatchConfig = field(default_factory=BatchConfig)
    dtype: str = "float32"
    device: str = "auto"


def read_config(path: str | Path) -> RunConfig:
    """Read and check a file.

    Raises:
        ImportanceError: it is missing, no YAML, or has keys or values that there are not.
    """
    try:
        given = OmegaConf.load(path)
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), given)
        found: Any = OmegaConf.to_object(merged)
    except (OSError, YAMLError, OmegaConfBaseException, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ImportanceError(f"The config {path} cannot be used: {first}") from error
    _check(found, path)
    found.batches.files = [str(Path(path).parent / name) for name in found.batches.files]
    return found


def targets_of(config: RunConfig) -> list[Target]:
    """As `hooks_for` takes them."""
    return [Target(target.pattern, target.kind, target.options) for target in config.targets]


def _check(config: RunConfig, path: str | Path) -> None:
    choices = {
        "dtype": (config.dtype, _DTYPES),
        "device": (config.device, _DEVICES),
        "batches.tokenizer": (config.batches.tokenizer, _TOKENIZERS),
    }
    for name, (given, known) in choices.items():
        if given not in known:
            raise ImportanceError(f"The config {path}: {name} is one of {known}, got {given!r}.")
    counts = {
        "batches.batch": config.batches.batch,
        "batches.sequence": config.batches.sequence,
        "batches.limit": config.batches.limit,
    }
    for name, number in counts.items():
        if number is not None and number < 1:
            raise ImportanceError(f"The config {path}: {name} must be 1 or more, got {number}.")
    if not config.targets or not config.batches.files:
        raise ImportanceError(f"The config {path} names no targets, or no batches.files.")
