"""The scoring run: hooks on a model, batches through it, checkpoints on the way."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from flex_model.core.flex_model import FlexModel
from flex_model.errors import ImportanceError
from flex_model.importance.activation import PaddingMask
from flex_model.importance.hook import ForwardHook
from flex_model.importance.run.batches import call, checked, device_of, digest, padding, to_device
from flex_model.importance.run.checkpoint import Checkpoints, Progress
from flex_model.importance.run.every import Every
from flex_model.importance.run.fingerprint import fingerprint
from flex_model.importance.run.local_state import local_states, take_up
from flex_model.importance.run.peers import Peers
from flex_model.importance.run.progress import Bar
from flex_model.importance.run.targets import Target, hooks_for, module_of
from flex_model.importance.run.turn import Turn, all_or_none, whole_mask
from flex_model.layouts.names import named_modules

__all__ = ["score"]

Scores = dict[str, dict[str, Tensor]]

_END = object()


def score(
    model: nn.Module,
    batches: Iterable[Any],
    hooks: Mapping[str, ForwardHook] | Sequence[Target],
    checkpoint_dir: str | Path | None = None,
    every: int | str | timedelta = "10m",
    *,
    console: Console | None = None,
) -> Scores:
    """Run batches through a model and score what its hooks look at, all kinds in one pass.

    Collective: every rank of the model calls it alike, each data-parallel rank with its own
    batches, as many as the others have. The model is left as it was.

    With ``checkpoint_dir`` each rank writes its part of the state now and then, and after the last
    batch. The same call, made again after a crash, passes over the batches that were done, and ends
    with the scores of a run that was never interrupted, to the bit. So the batches must come in the
    same order again (give a shuffling ``DataLoader`` a seeded generator): that is checked.

    Args:
        model: whole or sharded, in a FlexModel or not. A FlexModel tells what cannot be read off a
            model: ``FlexModel(model, {}, data_parallel_size=2)``.
        batches: tensors (``model(batch)``), mappings (``model(**batch)``) or tuples
            (``model(*batch)``), on any device. An ``attention_mask`` ``[batch, sequence]`` in a
            mapping tells padding, which counts for no score.
        hooks: by module name, as `hooks_for` makes them (``"name#kind"`` where a module has
            several); or targets, of which they are made.
        checkpoint_dir: a folder that all ranks see.
        every: batches (``10``) or time (``"90s"``, ``"10m"``, a ``timedelta``) from one checkpoint
            to the next.
        console: where the first rank shows its progress; None for standard error, if that is a
            terminal.

    Returns:
        What each hook's `to_dict` gives, on the CPU, by its key; the same on every rank.

    Raises:
        ImportanceError: on every rank alike: no batches or no hooks; activations that are not
            finite, with the module and the batch; ranks with other batches than the rest; a
            checkpoint of another model, set of hooks, number of ranks or batches, or one that
            cannot be read or written. The last checkpoint stays as it is.
        UnknownModuleError: a pattern or key names no module.
        RankFailedError: another rank has ended.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> found = score(model, [torch.ones(2, 3, 4)], [Target("2", "independent")])
        >>> found["2"]["score"].shape
        torch.Size([8])
    """
    when = Every.of(every)
    with _alongside(model) as own, _evaluating(own.module), torch.no_grad():
        mesh = own.parallel_mesh
        if mesh.size("pp") > 1:
            raise ImportanceError(
                "score() calls the model, but a pipeline's stage is called by its schedule. "
                "Register hooks by register_importance_hook and run the schedule."
            )
        made = hooks if isinstance(hooks, Mapping) else hooks_for(own, hooks, _length(batches))
        _register(own, made)
        peers, checkpoints = Peers(mesh), None
        if checkpoint_dir is not None:
            facts = fingerprint(own.module, made, mesh)
            checkpoints = Checkpoints(checkpoint_dir, peers, facts)
        with Bar(len(made), _length(batches), console, shown=peers.first) as bar:
            _Run(own, made, iter(batches), peers, checkpoints, when, bar).finish()
        return {
            key: {name: values.cpu() for name, values in hook.to_dict().items()}
            for key, hook in made.items()
        }


class _Run:
    """Batch after batch.

    Args:
        model: calls the hooks.
        hooks: by key.
        batches: of this rank.
        peers: the ranks.
        checkpoints: None to write none.
        every: when they are due.
        bar: shows how far it is.
    """

    def __init__(
        self,
        model: FlexModel,
        hooks: Mapping[str, ForwardHook],
        batches: Iterator[Any],
        peers: Peers,
        checkpoints: Checkpoints | None,
        every: Every,
        bar: Bar,
    ) -> None:
        self._model = model
        self._hooks = hooks
        self._ordered = _as_in_the_model(hooks, model.module)
        self._batches = batches
        self._peers = peers
        self._checkpoints = checkpoints
        self._every = every
        self._bar = bar
        self._device = device_of(model.module)
        self._done = self._digest = 0
        self._saved = -1
        self._since = time.monotonic()
        self._batch: Any = None

    def finish(self) -> None:
        """Take up the last checkpoint, and run what is left."""
        if self._checkpoints is not None:
            self._resume(self._checkpoints.newest())
        while self._one_more():
            pass
        if self._done == 0:
            raise ImportanceError("There are no batches to score by. Give at least one.")

    def _one_more(self) -> bool:
        """See to the batch before, then run the next; False if there is none."""
        rows = self._peers.meet(f"Batch {self._done}", self._next, Turn.width())
        told = {rank: Turn(*row) for rank, row in rows.items()}
        self._check_health(told)
        more = all_or_none(told, self._done)
        due = next(iter(told.values())).due
        if self._done and self._saved != self._done and (due or not more):
            self._save()
        if more:
            self._forward(whole_mask(told, padding(self._batch), self._peers.mesh))
        return more

    def _next(self) -> Sequence[int]:
        """Take the next batch; what to tell of it, and of the batch before."""
        self._batch = next(self._batches, _END)
        more = self._batch is not _END
        mask = padding(checked(self._batch)) if more else None
        real, tokens = (int(mask.sum()), mask.numel()) if mask is not None else (0, 0)
        due = self._checkpoints is not None and self._every.due(self._done, self._since)
        return Turn(more, mask is not None, real, tokens, self._sick(), due).encoded

    def _forward(self, mask: PaddingMask | None) -> None:
        for hook in self._hooks.values():
            hook.mask = mask
            hook.forget_health()
        try:
            call(self._model, to_device(self._batch, self._device))
        except ImportanceError as error:
            raise ImportanceError(f"Batch {self._done}: {error}") from error
        finally:
            for hook in self._hooks.values():
                hook.mask = None
        if self._checkpoints is not None:
            self._digest = digest(self._batch, self._digest)
        self._done += 1
        self._bar.advance()

    # -- health --------------------------------------------------------------------------------

    def _sick(self) -> int:
        """One read for all hooks: it is here that an accelerator is waited for."""
        told = [(n, self._hooks[key].healthy) for n, key in enumerate(self._ordered)]
        asked = [(number, flag) for number, flag in told if flag is not None]
        if not asked:
            return -1
        device = asked[0][1].device
        healthy = torch.stack([flag.to(device) for _, flag in asked]).tolist()
        return next((n for (n, _), fine in zip(asked, healthy, strict=True) if not fine), -1)

    def _check_health(self, told: Mapping[int, Turn]) -> None:
        sick = {rank: turn.sick for rank, turn in told.items() if turn.sick >= 0}
        if sick:
            key = self._ordered[min(sick.values())]
            raise ImportanceError(
                f"Batch {self._done - 1}: activations of {module_of(key)} hold NaNs or infinities, "
                f"on rank(s) {list(sick)}. No checkpoint holds them: leave the "
                "batch out, or mend the model, and resume."
            )

    # -- checkpoints ---------------------------------------------------------------------------

    def _save(self) -> None:
        if self._checkpoints is None:
            return
        state = local_states(self._hooks)
        self._checkpoints.save(Progress(self._done, self._digest, state))
        self._saved, self._since = self._done, time.monotonic()
        self._bar.saved(self._done)

    def _resume(self, found: Progress | None) -> None:
        if found is None:
            return
        self._peers.agreed("Resuming", lambda: self._pass_over(found))
        take_up(self._hooks, found.state, self._peers.mesh, self._device)
        self._digest = found.digest
        self._done = self._saved = found.batches
        self._bar.resumed(found.batches)

    def _pass_over(self, found: Progress) -> None:
        """Take the batches that were done, and see that they are the same."""
        seen = 0
        for number in range(found.batches):
            batch = next(self._batches, _END)
            if batch is _END:
                raise ImportanceError(
                    f"the checkpoint has {found.batches} batches, but here are {number}."
                )
            seen = digest(batch, seen)
        if seen != found.digest:
            raise ImportanceError(
                f"the first {found.batches} batches are others than those that the checkpoint was "
                "made with. Give the same in the same order: seed what shuffles them."
            )


def _register(model: FlexModel, hooks: Mapping[str, ForwardHook]) -> None:
    if not hooks:
        raise ImportanceError("There are no hooks to score by. Give at least one.")
    for key, hook in hooks.items():
        if not isinstance(hook, ForwardHook):
            raise ImportanceError(f"{key} must have a ForwardHook, got {type(hook).__name__}.")
        hook.forget_health()
        model.register_importance_hook(module_of(key), hook)


def _as_in_the_model(hooks: Iterable[str], root: nn.Module) -> list[str]:
    """Keys in the order of their modules, which is mostly that of their calls: of several that
    hold NaNs the first is to be named.
    """
    places = {name: place for place, (name, _) in enumerate(named_modules(root))}
    return sorted(hooks, key=lambda key: places.get(module_of(key), len(places)))


def _length(batches: Iterable[Any]) -> int | None:
    return len(batches) if isinstance(batches, Sized) else None


@contextmanager
def _alongside(model: nn.Module) -> Iterator[FlexModel]:
    """A FlexModel of our own around the model, for as long as the run lasts."""
    own = model.beside() if isinstance(model, FlexModel) else FlexModel(model, {})
    watch = own.parallel_mesh.watch
    if watch is not None:
        watch.attached("scores", True)  # the hooks' sums are asked for after the model is restored
    try:
        yield own
    finally:
        own.restore()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; every module is left in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
