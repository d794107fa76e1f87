"""A process group together with how to wait on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

from flex_model.distributed.watch import Watch

__all__ = ["Communicator"]


@dataclass(frozen=True)
class Communicator:
    """Some ranks, and the watch that is kept while waiting for them.

    Attributes:
        group: the ranks.
        watch: None waits as torch does, until the group's own timeout.
    """

    group: ProcessGroup
    watch: Watch | None = None

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.group.size()

    @property
    def ranks(self) -> list[int]:
        """Their global ranks, in group order."""
        return dist.get_process_group_ranks(self.group)

    def finish(self, work: Work, device: torch.device) -> None:
        """Wait for a collective begun with ``async_op=True``."""
        if self.watch is None or device.type != "cpu":
            work.wait()
        else:
            self.watch.finish(work, self.watch.enter(self.group.group_name, self.ranks), self.group)
