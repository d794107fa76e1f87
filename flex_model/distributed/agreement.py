"""What the ranks must agree on before a forward: hooks, groups and inputs.

One all-gather of a few integers per forward, and only while hooks are registered. It also tells
every rank the others' batch sizes, so that ragged data-parallel batches are gathered rightly
(gloo ends the process on an uneven all-gather that nobody announced).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from flex_model.distributed.mesh import ParallelMesh
from flex_model.errors import RankDisagreementError

__all__ = ["StepFacts", "agree"]

_MAX_DIMS = 8


@dataclass(frozen=True)
class StepFacts:
    """What one rank is about to do.

    Attributes:
        hooks: digest of the active hooks, in order.
        gather_backwards: gathers that ran backward so far (a loss on a gathered tensor).
        input_shape: sizes of the first input tensor; empty if there is none.
        batch_dim: which of its dims is the batch.
    """

    hooks: int
    gather_backwards: int
    input_shape: tuple[int, ...]
    batch_dim: int

    def encoded(self) -> list[int]:
        shape = self.input_shape[:_MAX_DIMS]
        padding = [0] * (_MAX_DIMS - len(shape))
        return [self.hooks, self.gather_backwards, len(shape), *shape, *padding]

    @classmethod
    def decoded(cls, row: Sequence[int], batch_dim: int) -> StepFacts:
        return cls(row[0], row[1], tuple(row[3 : 3 + row[2]]), batch_dim)

    @property
    def shape_but_batch(self) -> tuple[int, ...]:
        at = self.batch_dim
        return self.input_shape[:at] + self.input_shape[at + 1 :]


def agree(mesh: ParallelMesh, facts: StepFacts, device: torch.device) -> tuple[int, ...]:
    """Compare the ranks' facts; return the batch size of every rank along dp.

    Raises:
        RankDisagreementError: alike on every rank, listing what each one has.
    """
    own = torch.tensor(facts.encoded(), dtype=torch.int64, device=device)
    gathered = own.new_empty(len(mesh.ranks) * own.numel())
    dist.all_gather_single(gathered, own, group=mesh.everyone)
    rows = gathered.view(len(mesh.ranks), -1).tolist()
    all_facts = [StepFacts.decoded(row, facts.batch_dim) for row in rows]
    _check(mesh, all_facts)
    if mesh.size("dp") == 1 or not facts.input_shape:
        return ()
    by_rank = dict(zip(_group_order(mesh), all_facts, strict=True))
    members = dist.get_process_group_ranks(mesh.group("dp"))
    return tuple(by_rank[rank].input_shape[facts.batch_dim] for rank in members)


def _group_order(mesh: ParallelMesh) -> list[int]:
    return dist.get_process_group_ranks(mesh.everyone or dist.group.WORLD)


def _check(mesh: ParallelMesh, all_facts: Sequence[StepFacts]) -> None:
    ranks = _group_order(mesh)

    def refuse(what: str, values: Sequence[object], way_out: str) -> None:
        if len(set(values)) > 1:
            listed = ", ".join(f"rank {r}: {v}" for r, v in zip(ranks, values, strict=True))
            raise RankDisagreementError(f"Ranks disagree on {what}: {listed}. {way_out}")

    refuse(
        "which hooks are active",
        [f"{f.hooks:08x}" for f in all_facts],
        "Register the same hooks in the same order, with the same groups, on every rank.",
    )
    refuse(
        "how often a gathered activation got a gradient of its own",
        [f.gather_backwards for f in all_facts],
        "A loss term built on a whole activation must be computed on every rank.",
    )
    refuse(
        "the input's shape besides the batch",
        [f.shape_but_batch for f in all_facts],
        "Pad the ranks' batches to one length.",
    )
    for coordinate in {mesh.coordinate_of(rank, "dp") for rank in ranks}:
        replica = [
            f.input_shape
            for rank, f in zip(ranks, all_facts, strict=True)
            if mesh.coordinate_of(rank, "dp") == coordinate
        ]
        if len(set(replica)) > 1:
            raise RankDisagreementError(
                f"Ranks of data-parallel replica {coordinate} got inputs of different shapes: "
                f"{replica}. Every rank of a replica must get the same batch."
            )
