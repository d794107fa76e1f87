"""A CPU group of FlexModel's own, for what ranks tell each other beside the model's collectives.

The model's groups may be in the midst of the model's own collectives on some rank that runs other
hooks; on this group a rank meets only ranks that mean the same. It does not lie in torch's registry
of groups: there, names are counted per process, and a group made after another one was destroyed
may find that one's addresses in the store.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, Work

from flex_model.distributed.board import Wait
from flex_model.distributed.watch import Watch

__all__ = ["ControlGroup", "Transfer"]


class Transfer:
    """A tensor on its way from one rank to another.

    It is waited for in a thread of its own: gloo breaks the connection of one that has not come
    when a wait with a timeout ends.
    """

    def __init__(self, work: Work, entered: Wait) -> None:
        self.entered = entered
        self._work = work
        self._error: RuntimeError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="flex_model transfer")
        self._thread.start()

    def wait(self, timeout: timedelta = timedelta.max) -> None:
        """As a collective's: RuntimeError if it failed, or has not come in time."""
        self._thread.join(min(timeout.total_seconds(), threading.TIMEOUT_MAX))
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise RuntimeError("not yet")

    def is_completed(self) -> bool:
        """Whether it has come, or failed."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            self._error = error


class ControlGroup:
    """Some ranks, meeting on the CPU. Constructing it is collective.

    Args:
        store: that all of them reach.
        name: of the group; the same on its ranks and never used before.
        ranks: global ranks, this one among them.
        watch: kept while waiting for the others.
    """

    def __init__(self, store: Store, name: str, ranks: Sequence[int], watch: Watch) -> None:
        self.ranks = tuple(ranks)
        self._name = name
        self._watch = watch
        own = self.ranks.index(dist.get_rank())
        # torch's stubs leave most of this class's methods out.
        self._gloo: Any = dist.ProcessGroupGloo(  # type: ignore[call-arg]
            PrefixStore(name, store), own, len(self.ranks)
        )
        # A rank that dropped its end before the others have connected would break theirs.
        self.exchange((0,))

    def exchange(self, own: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """Every rank's few integers, by rank: one small all-gather."""
        row = torch.tensor(own, dtype=torch.int64)
        rows = row.new_empty(len(self.ranks) * len(own))
        work = self._gloo._allgather_base(rows, row)
        self._watch.finish(work, self._watch.enter(self._name, self.ranks), self._gloo)
        return dict(zip(self.ranks, map(tuple, rows.view(-1, len(own)).tolist()), strict=True))

    def send(self, tensor: Tensor, to: int, tag: int) -> Transfer:
        """Begin to send a CPU tensor to a global rank; the caller keeps it until it is finished."""
        work = self._gloo.send([tensor.contiguous()], self.ranks.index(to), tag)
        return Transfer(work, self._entered(dist.get_rank(), to, tag))

    def receive(self, tensor: Tensor, source: int, tag: int) -> None:
        """Fill a CPU tensor with what a global rank sends."""
        work = self._gloo.recv([tensor], self.ranks.index(source), tag)
        self.finish(Transfer(work, self._entered(source, dist.get_rank(), tag)))

    def finish(self, transfer: Transfer) -> None:
        """Wait for what was sent."""
        self._watch.finish(transfer, transfer.entered, self._gloo)

    def _entered(self, source: int, to: int, tag: int) -> Wait:
        name, where = f"{self._name}/{source}-{to}/{tag}", f"what rank {source} sends rank {to}"
        return self._watch.enter(name, (source, to), where)
