"""A CPU group of FlexModel's own, for what ranks tell each other beside the model's collectives.

The model's groups may be in the midst of the model's own collectives on some rank that runs other
hooks; on this group a rank meets only ranks that mean the same. It does not lie in torch's registry
of groups: there, names are counted per process, and a group made after another one was destroyed
may find that one's addresses in the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, Work

from flex_model.distributed.watch import Watch

__all__ = ["ControlGroup"]


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

    def exchange(self, own: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """Every rank's few integers, by rank: one small all-gather."""
        row = torch.tensor(own, dtype=torch.int64)
        rows = row.new_empty(len(self.ranks) * len(own))
        self._finish(self._gloo._allgather_base(rows, row))
        return dict(zip(self.ranks, map(tuple, rows.view(-1, len(own)).tolist()), strict=True))

    def send(self, tensor: Tensor, to: int, tag: int) -> Work:
        """Begin to send a CPU tensor to a global rank; the caller keeps it until it is finished."""
        work: Work = self._gloo.send([tensor.contiguous()], self.ranks.index(to), tag)
        return work

    def receive(self, tensor: Tensor, source: int, tag: int) -> None:
        """Fill a CPU tensor with what a global rank sends."""
        self._finish(self._gloo.recv([tensor], self.ranks.index(source), tag))

    def finish(self, work: Work) -> None:
        """Wait for what was sent."""
        self._finish(work)

    def _finish(self, work: Work) -> None:
        self._watch.finish(work, self._name, self.ranks, self._gloo)
