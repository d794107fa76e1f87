"""What the ranks must agree on before a forward: hooks, groups and inputs.

One all-gather of a few integers per forward, and only while hooks are registered. It also tells
every rank the others' batch sizes, so that ragged data-parallel batches are gathered rightly
(gloo ends the process on an uneven all-gather that nobody announced).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from flex_model.distributed.collectives import exchanged
from flex_model.distributed.mesh import ParallelMesh
from flex_model.errors import RankDisagreementError
from flex_model.layouts.marks import FOREIGN, TERM, UNKNOWN, WHOLE, Cut, Mark, OneOf, one_of

__all__ = ["StepFacts", "agree", "agree_on_length", "agree_on_marks"]

_MAX_DIMS = 8
_MAX_CUTS = 8
_STATES: tuple[Mark, ...] = (WHOLE, TERM, FOREIGN, UNKNOWN)


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
    rows = exchanged(facts.encoded(), device, mesh.everyone)
    all_facts = [StepFacts.decoded(row, facts.batch_dim) for row in rows]
    _check(mesh, all_facts)
    if mesh.size("dp") == 1 or not facts.input_shape:
        return ()
    by_rank = dict(zip(_group_order(mesh), all_facts, strict=True))
    members = dist.get_process_group_ranks(mesh.group("dp"))
    return tuple(by_rank[rank].input_shape[facts.batch_dim] for rank in members)


def agree_on_marks(
    mesh: ParallelMesh, marks: Mapping[str, Mark], device: torch.device
) -> dict[str, Mark]:
    """What the ranks know together of how a tensor lies.

    A rank with one sample, or none, sees less than the others; what each leaves open is compared
    along the mesh dim in question, so that all go on with the same. Collective.
    """
    return {
        name: _common(
            [_decoded(row) for row in exchanged(_encoded(mark), device, mesh.group(name))]
        )
        for name, mark in marks.items()
    }


def agree_on_length(mesh: ParallelMesh, length: int, device: torch.device) -> int:
    """The longest of the data-parallel ranks' lengths: those of an empty batch tell nothing."""
    return max(row[0] for row in exchanged([length], device, mesh.group("dp")))


def _common(marks: Sequence[Mark]) -> Mark:
    """The cuts that no rank excludes; else what those say that know something."""
    sets = [mark.cuts if isinstance(mark, OneOf) else {mark} for mark in marks]
    cutting = [s for s in sets if all(isinstance(mark, Cut) for mark in s)]
    plain = {mark for mark in marks if mark in (WHOLE, TERM)}
    if cutting and not plain:
        return one_of(frozenset.intersection(*map(frozenset, cutting)))
    if not cutting and len(plain) == 1:
        return plain.pop()
    return FOREIGN if all(mark is FOREIGN for mark in marks) else UNKNOWN


def _encoded(mark: Mark) -> list[int]:
    cuts = mark.cuts if isinstance(mark, OneOf) else {mark} if isinstance(mark, Cut) else set()
    numbers = [n for cut in sorted(cuts, key=str)[:_MAX_CUTS] for n in (cut.dim, cut.outer)]
    state = _STATES.index(mark) if mark in _STATES else -1
    return [state, len(numbers), *numbers, *[0] * (2 * _MAX_CUTS - len(numbers))]


def _decoded(row: Sequence[int]) -> Mark:
    if row[0] >= 0:
        return _STATES[row[0]]
    numbers = row[2 : 2 + row[1]]
    return one_of(Cut(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True))


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
