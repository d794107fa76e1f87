"""Scores and states on disk, as pruning pipelines read them: one file per rank, all or none.

    rank_0.safetensors ...               every module's `to_dict`, keys "module:name"
    hook_states_rank_0.safetensors ...   every module's `state_dict`
    args.json                            what the run was started with
    channel_importance_results.json      hidden channels in order, where norms were scored

Every file is written under a temporary name and renamed when all ranks have written theirs. What
is no tensor lies in the safetensors header as JSON. ``file_format="pth"`` writes torch's own files,
for pipelines that read those; they are read back with ``weights_only=True`` only.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flex_model.errors import ImportanceError

if TYPE_CHECKING:
    from flex_model.importance.hook import ForwardHook

__all__ = [
    "Format",
    "as_container",
    "check_folder",
    "dump_scores",
    "load_scores",
    "load_states",
    "save_states",
]
__all__ += ["read", "replaced", "results_of_norms", "write", "write_json"]

Format = Literal["safetensors", "pth"]
Nested = Mapping[str, Mapping[str, Any]]

_SCORES = "rank_"
_STATES = "hook_states_rank_"
_BETWEEN = ":"
_UNREADABLE: tuple[type[Exception], ...] = (
    *(SafetensorError, KeyError, ValueError, RuntimeError, EOFError, TypeError),
    pickle.UnpicklingError,  # what ``weights_only`` refuses
)
_REST = "values"


def dump_scores(
    hooks: Mapping[str, ForwardHook],
    folder: str | Path,
    args: Any,
    *,
    file_format: Format = "safetensors",
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write every hook's `to_dict` to ``rank_{rank}``, and from rank 0 ``args.json``. Collective.

    Args:
        hooks: by module name, as on every rank that runs the same modules.
        folder: made if it does not exist.
        args: what the run was started with, a mapping or an OmegaConf container. It is left as it
            is; ``activation_hooks_kwargs.model`` is not written.
        file_format: "safetensors", or "pth".
        extra: further JSON files that rank 0 writes, by name.

    Raises:
        ImportanceError: a file of another run's rank lies there, or a rank could not write.
    """
    found = {module: hook.to_dict() for module, hook in hooks.items()}
    texts = {"args.json": as_container(args), **(extra or {})}
    _write_all(Path(folder), _SCORES, found, file_format, texts)


def save_states(
    hooks: Mapping[str, ForwardHook], folder: str | Path, *, file_format: Format = "safetensors"
) -> None:
    """Write every hook's `state_dict` to ``hook_states_rank_{rank}``. Collective.

    Raises:
        ImportanceError: see `dump_scores`.
    """
    found = {module: hook.state_dict() for module, hook in hooks.items()}
    _write_all(Path(folder), _STATES, found, file_format, {})


def load_scores(folder: str | Path) -> dict[str, dict[str, Tensor]]:
    """Every module's scores, from all ranks' files.

    Raises:
        ImportanceError: there are none, or one that cannot be read.
    """
    return _read_all(Path(folder), _SCORES)


def load_states(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Every module's state, from all ranks' files; each for its hook's ``load_state_dict``.

    Raises:
        ImportanceError: see `load_scores`.
    """
    return _read_all(Path(folder), _STATES)


def check_folder(folder: str | Path) -> None:
    """See early what `dump_scores` would refuse late. Collective.

    Raises:
        ImportanceError: a file of another run's rank lies there.
    """
    _check_folder(Path(folder), _SCORES, "safetensors")


def as_container(args: Any) -> dict[str, Any]:
    """Arguments as plain values, with interpolations resolved and without the model."""
    container = args if OmegaConf.is_config(args) else OmegaConf.create(_without_model(args))
    plain: Any = OmegaConf.to_container(container, resolve=True)
    return _without_model(plain)


def _without_model(args: Any) -> dict[str, Any]:
    args = dict(args) if isinstance(args, Mapping) else dict(vars(args) if args is not None else {})
    kwargs = args.get("activation_hooks_kwargs")
    if isinstance(kwargs, Mapping):
        kept = {name: value for name, value in kwargs.items() if name != "model"}
        args["activation_hooks_kwargs"] = kept
    return args


# -- one file ----------------------------------------------------------------------------------


def write(path: Path, found: Nested) -> None:
    """One file of tensors, and of values that JSON holds, by module and name."""
    if path.suffix == ".pth":
        torch.save({m: {n: _on_cpu(v) for n, v in of.items()} for m, of in found.items()}, path)
        return
    tensors, rest = {}, {}
    for module, named in found.items():
        for name, value in named.items():
            key = f"{module}{_BETWEEN}{name}"
            if isinstance(value, Tensor):
                tensors[key] = _on_cpu(value)
            else:
                rest[key] = value
    save_file(tensors, path, metadata={_REST: json.dumps(rest), "modules": json.dumps([*found])})


def read(path: Path) -> dict[str, dict[str, Any]]:
    """What `write` wrote.

    Raises:
        ImportanceError: the file is damaged, or something else.
    """
    try:
        if path.suffix == ".pth":
            loaded: dict[str, dict[str, Any]] = torch.load(path, weights_only=True)
            return loaded
        with safe_open(path, "pt") as file:
            told = file.metadata()
            found: dict[str, dict[str, Any]] = {m: {} for m in json.loads(told["modules"])}
            values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            for key, value in {**values, **json.loads(told[_REST])}.items():
                module, _, name = key.rpartition(_BETWEEN)
                found[module][name] = value
            return found
    except _UNREADABLE as error:
        why = str(error).partition("\n")[0]
        raise ImportanceError(f"{path} cannot be read ({why}). Write it again.") from error


def write_json(path: Path, found: Any) -> None:
    """One text file."""
    path.write_text(json.dumps(found, indent=2))


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu().contiguous().clone() if isinstance(value, Tensor) else value


# -- all ranks' files --------------------------------------------------------------------------


def _write_all(
    folder: Path, prefix: str, found: Nested, file_format: Format, texts: Mapping[str, Any]
) -> None:
    if file_format not in ("safetensors", "pth"):
        raise ImportanceError(f'file_format must be "safetensors" or "pth", got {file_format!r}.')
    rank, _ = _place()
    _check_folder(folder, prefix, file_format)
    writers: dict[Path, Callable[[Path], None]] = {
        folder / f"{prefix}{rank}.{file_format}": lambda path: write(path, found)
    }
    if rank == 0:
        for name, text in texts.items():
            writers[folder / name] = lambda path, text=text: write_json(path, text)  # type: ignore[misc]
    replaced(writers, _agreed)


def replaced(
    writers: Mapping[Path, Callable[[Path], None]],
    agreed: Callable[[str, Callable[[], None]], None],
) -> None:
    """Write files under temporary names, and rename them once every rank has written its own.

    Args:
        writers: by path, what writes a file at the path given.
        agreed: runs a step on every rank, and fails on all of them if it fails on one.
    """
    temporary = {path: path.with_name(f".{path.stem}.unfinished{path.suffix}") for path in writers}

    def write_temporary() -> None:
        for path, writer in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            writer(temporary[path])
            _flush(temporary[path])

    def rename() -> None:
        for path, name in temporary.items():
            os.replace(name, path)  # noqa: PTH105

    agreed("writing", write_temporary)
    agreed("renaming", rename)


def _flush(path: Path) -> None:
    """A file that is renamed must not be empty after a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _check_folder(folder: Path, prefix: str, file_format: Format) -> None:
    _, ranks = _place()
    due = {f"{prefix}{number}.{file_format}" for number in range(ranks)}
    _agreed("stale files", lambda: _refuse_stale(folder, prefix, due))


def _refuse_stale(folder: Path, prefix: str, due: Iterable[str]) -> None:
    stale = sorted(path.name for path in _files(folder, prefix) if path.name not in due)
    if stale:
        raise ImportanceError(
            f"{folder} holds {stale} of an earlier run on other ranks, which would be read "
            "together with this run's. Remove them, or choose another folder."
        )


def _files(folder: Path, prefix: str) -> list[Path]:
    return [p for p in folder.glob(f"{prefix}*") if p.suffix in (".safetensors", ".pth")]


def _read_all(folder: Path, prefix: str) -> dict[str, dict[str, Any]]:
    paths = sorted(_files(folder, prefix))
    if not paths:
        raise ImportanceError(f"{folder} holds no {prefix}* files. Score a model into it first.")
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        for module, named in read(path).items():
            found.setdefault(module, named)
    return found


def _place() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _agreed(what: str, step: Callable[[], None]) -> None:
    """Run a step; if it fails on any rank, every rank raises, naming those."""
    error: Exception | None = None
    try:
        step()
    except Exception as raised:  # noqa: BLE001  (whatever it is, the others must hear of it)
        error = raised
    _, ranks = _place()
    told: list[str | None] = [_spelled(error)]
    if ranks > 1:
        told = [None] * ranks
        dist.all_gather_object(told, _spelled(error))
    failed = {number: text for number, text in enumerate(told) if text is not None}
    if failed:
        spelled = "; ".join(f"rank {number}: {text}" for number, text in failed.items())
        raise ImportanceError(f"{what} failed, and no file was changed: {spelled}") from error


def _spelled(error: Exception | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"


def results_of_norms(scores: Mapping[str, Tensor], args: Any, timestamp: str) -> dict[str, Any]:
    """The ranking of hidden channels over all norms, for ``channel_importance_results.json``.

    Args:
        scores: ``[hidden]`` by norm.
        args: what the run was started with.
        timestamp: when.
    """
    told = copy.deepcopy(as_container(args))
    total = torch.stack([score.cpu() for score in scores.values()]).mean(0)
    return {
        "model_path": told.get("model_name_or_path", "unknown"),
        "dataset_path": told.get("dataset_path", "unknown"),
        "experiment_id": told.get("experiment_id", f"experiment_{timestamp}"),
        "eval_samples": told.get("eval_samples", 0),
        "micro_batch_size": told.get("micro_batch_size", 0),
        "timestamp": timestamp,
        "total_channels": total.numel(),
        "channel_importance_ranking": total.argsort(descending=True).tolist(),
        "channel_scores": total.tolist(),
        "score_statistics": {
            "min": total.min().item(),
            "max": total.max().item(),
            "mean": total.mean().item(),
            "std": total.std().item(),
        },
    }
