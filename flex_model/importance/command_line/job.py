"""A whole scoring run of the command line, from joining the job to leaving it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from flex_model.core.flex_model import FlexModel
from flex_model.errors import ConfigurationError, FlexModelError, ImportanceError, RankFailedError
from flex_model.importance import files
from flex_model.importance.command_line.run_config import RunConfig, read_config, targets_of
from flex_model.importance.hook import ForwardHook
from flex_model.importance.results.report import write_report
from flex_model.importance.results.summary import Row
from flex_model.importance.results.table import score_table
from flex_model.importance.run.peers import Peers
from flex_model.importance.run.scoring import score
from flex_model.importance.run.targets import hooks_for, kind_of, module_of
from flex_model.loading.token_files import TokenBatches, read_tokens
from flex_model.loading.transformers_model import from_directory, tokenizer_of

__all__ = ["Request", "run_score"]

_RESULTS = "channel_importance_results.json"


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        model: a transformers model's directory.
        config: the file that says what is scored, and by which batches.
        out: where the results go.
        checkpoint: where the run's state is kept; None to keep none.
        every: see `score`.
        tp: tensor-parallel ranks; 0 for all that ``dp`` leaves.
        dp: data-parallel ranks.
    """

    model: str
    config: str
    out: str
    checkpoint: str | None
    every: str
    tp: int
    dp: int


def run_score(request: Request, console: Console) -> int:
    """Score on this job's ranks, and print on the first.

    Returns:
        0, or 2 where something is refused by name.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        config = read_config(request.config)
        if config.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        with _joined():
            found = _scored(request, config)
            if rank == 0:
                console.print(score_table(found))
                console.print(f"{request.out}: rank files, scores.safetensors, .png and .html")
    except FlexModelError as error:
        # What all refuse one tells; of a rank that has gone each tells what it knows.
        if rank == 0 or isinstance(error, RankFailedError):
            console.print(Text.assemble(("error: ", "red"), str(error)))
        return 2
    return 0


def _scored(request: Request, config: RunConfig) -> list[Row]:
    model = _loaded(request, config)
    peers = Peers(model.parallel_mesh)
    batches = _batches(request, config, model.module, peers)
    hooks = hooks_for(model, targets_of(config), len(batches))
    files.check_folder(request.out)
    with model:
        scores = score(model, batches, hooks, request.checkpoint, request.every)
        args = _args(request, config, batches)
        extra = _results(scores, hooks, args)
        files.dump_scores(hooks, request.out, args, extra=extra)
        rows: list[Row] = []

        def report() -> None:
            title = f"Importance scores of {Path(request.model).name}"
            rows.extend(write_report(scores, hooks, request.out, title, args))

        peers.agreed("Writing the report", report if peers.first else lambda: None)
    return rows


def _loaded(request: Request, config: RunConfig) -> FlexModel:
    """The model, as the plan of its architecture shards it.

    Raises:
        ConfigurationError: no such directory, or sizes that do not fit the ranks.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    tp = request.tp or max(1, world // request.dp)
    if tp * request.dp != world:
        raise ConfigurationError(
            f"tp={tp} x dp={request.dp} need {tp * request.dp} ranks, but the job has {world}. "
            f"Start with torchrun --nproc-per-node {tp * request.dp} --no-python flex-model ..."
        )
    if not (Path(request.model) / "config.json").is_file():
        raise ConfigurationError(f"There is no model in {request.model}: it has no config.json.")
    module = from_directory(request.model, tp, request.dp, dtype=getattr(torch, config.dtype))
    if world == 1 and torch.cuda.is_available():
        module = module.to("cuda")
    return FlexModel(module, {}, tensor_parallel_size=tp, data_parallel_size=request.dp)


def _batches(request: Request, config: RunConfig, module: nn.Module, peers: Peers) -> TokenBatches:
    """Read on every rank; what one of them cannot read, all refuse."""
    given, mesh, found = config.batches, peers.mesh, []

    def encode(text: str) -> Sequence[int]:
        if given.tokenizer == "bytes":
            return list(text.encode())
        ids: list[int] = tokenizer_of(request.model)(text)["input_ids"]
        return ids

    def read() -> None:
        tokens = read_tokens([Path(name) for name in given.files], given.sequence, encode)
        _check_vocabulary(tokens.ids, module)
        found.append(tokens)

    peers.agreed("Reading the batches", read)
    rank, ranks = mesh.coordinate("dp"), mesh.size("dp")
    return TokenBatches(found[0], given.batch, rank, ranks, given.limit)


def _check_vocabulary(ids: Tensor, module: nn.Module) -> None:
    vocabulary = module.get_input_embeddings().num_embeddings  # type: ignore[operator]
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= vocabulary:
        raise ImportanceError(
            f"there are token ids from {least} to {most}, but the model's are from 0 to "
            f"{vocabulary - 1}. Give ids of its own tokenizer."
        )


def _args(request: Request, config: RunConfig, batches: TokenBatches) -> dict[str, Any]:
    """What the run was started with, under the names that pruning pipelines look for too."""
    return {
        "model_name_or_path": request.model,
        "dataset_path": ", ".join(config.batches.files),
        "eval_samples": batches.sequences,
        "micro_batch_size": config.batches.batch,
        **asdict(request),
        **asdict(config),
    }


def _results(
    scores: Mapping[str, Mapping[str, Tensor]], hooks: Mapping[str, ForwardHook], args: Any
) -> dict[str, Any]:
    """The ranking of hidden channels, where norms of one width were scored."""
    norms = {
        module_of(key): named["score"]
        for key, named in scores.items()
        if kind_of(hooks[key]) == "layer_norm"
    }
    if len({values.shape for values in norms.values()}) != 1:
        return {}
    return {_RESULTS: files.results_of_norms(norms, args, time.strftime("%Y_%m_%d__%H_%M_%S"))}


@contextmanager
def _joined() -> Iterator[None]:
    """In the group that torchrun's variables tell of, if they do."""
    if "RANK" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group()
    try:
        yield
        dist.barrier()  # whoever watches the ranks ends all of them as the first one leaves
    finally:
        if dist.is_initialized():  # a rank that another one failed has left already
            dist.destroy_process_group()
