"""The ranks that hold the same part of each pipeline stage, and what they send each other."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from flex_model.distributed.control import ControlGroup, Transfer
from flex_model.distributed.mesh import ParallelMesh
from flex_model.errors import EditError

__all__ = ["Line"]

# Of each message: its length and its content.
_TAGS = 2


class Line:
    """One rank of every pipeline stage, in stage order, on a CPU group of FlexModel's own.

    Args:
        mesh: the job's ranks, `watched`.
        group: all of them.
    """

    def __init__(self, mesh: ParallelMesh, group: ControlGroup) -> None:
        self.stage = mesh.coordinate("pp")
        self.stages = mesh.size("pp")
        self._ranks = [mesh.rank_at("pp", stage) for stage in range(self.stages)]
        self._group = group
        self._under_way: list[tuple[Transfer, Tensor]] = []
        self._given_up = 0

    @property
    def others(self) -> list[int]:
        """The other stages."""
        return [stage for stage in range(self.stages) if stage != self.stage]

    def has(self, rank: int) -> bool:
        """Whether a global rank is on this line."""
        return rank in self._ranks

    def stage_of(self, rank: int) -> int:
        """The stage of a rank of this line."""
        return self._ranks.index(rank)

    def send(self, stage: int, content: Any) -> None:
        """Begin to send tensors, numbers, strings, or lists, tuples and dicts of them.

        The stage need not wait for it yet; `finish` waits until it has it.
        """
        buffer = io.BytesIO()
        torch.save(content, buffer)
        packed = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
        for tensor, tag in zip((torch.tensor([len(packed)]), packed), self._tags(), strict=True):
            self._under_way.append((self._group.send(tensor, self._ranks[stage], tag), tensor))

    def receive(self, stage: int, what: str) -> Any:
        """Wait for what a stage sent next.

        Args:
            stage: the sender's.
            what: of what kind it is, for messages.

        Raises:
            EditError: it holds objects of other types.
        """
        of_length, of_content = self._tags()
        length = torch.zeros(1, dtype=torch.int64)
        self._group.receive(length, self._ranks[stage], of_length)
        content = bytearray(int(length))
        packed = torch.frombuffer(content, dtype=torch.uint8)
        self._group.receive(packed, self._ranks[stage], of_content)
        try:
            return torch.load(io.BytesIO(content), weights_only=True)
        except Exception as error:
            raise EditError(
                f"{what} of pipeline stage {stage} holds what cannot pass between stages: {error} "
                "Store tensors, numbers, strings, and lists, tuples and dicts of them."
            ) from error

    def exchange(self, own: Any, what: str) -> list[Any]:
        """What every stage has, in stage order. Collective."""
        for stage in self.others:
            self.send(stage, own)
        told = [
            own if stage == self.stage else self.receive(stage, what)
            for stage in range(self.stages)
        ]
        self.finish()
        return told

    def shared(self, own: Any, stage: int, what: str) -> Any:
        """What one stage has, on every stage."""
        if stage != self.stage:
            return self.receive(stage, what)
        for other in self.others:
            self.send(other, own)
        self.finish()
        return own

    def finish(self) -> None:
        """Wait until everything sent has been received."""
        while self._under_way:
            transfer, _ = self._under_way.pop(0)
            self._group.finish(transfer)

    def give_up(self) -> None:
        """Nothing of what is under way now is ever to be taken for what is sent later."""
        self._under_way = []
        self._given_up += 1

    def _tags(self) -> range:
        first = _TAGS * self._given_up
        return range(first, first + _TAGS)
