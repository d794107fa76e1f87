"""What the ranks must agree on before a forward: hooks, groups and inputs.

One all-gather of a few integers per forward with active hooks, on a CPU group of our own. It also
tells every rank the others' batch sizes, so that ragged data-parallel batches are gathered rightly
(gloo ends the process on an uneven all-gather that nobody announced). A rank that runs no hook
stays away; the ranks that wait for it see on the board that it does.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from flex_model.distributed.collectives import exchanged
from flex_model.distributed.control import ControlGroup
from flex_model.distributed.look import difference
from flex_model.distributed.mesh import ParallelMesh
from flex_model.errors import ConfigurationError, RankDisagreementError
from flex_model.layouts.marks import FOREIGN, TERM, UNKNOWN, WHOLE, Cut, Mark, OneOf, one_of

__all__ = ["StepFacts", "agree", "agree_on_hooks", "agree_on_length", "agree_on_marks", "word_for"]

_MAX_DIMS = 8
_MAX_CUTS = 8
_STATES: tuple[Mark, ...] = (WHOLE, TERM, FOREIGN, UNKNOWN)


@dataclass(frozen=True)
class StepFacts:
    """What one rank is about to do, and has done.

    Attributes:
        step: number of the forward.
        hooks: how many hooks are active, and a digest of them in order.
        visits: a digest of the hook points visited so far, in order.
        gather_backwards: gathers that ran backward so far (a loss on a gathered tensor).
        input_shape: sizes of the first input tensor; empty if there is none.
        batch_dim: which of its dims is the batch.
    """

    step: int
    hooks: tuple[int, int]
    visits: int
    gather_backwards: int
    input_shape: tuple[int, ...]
    batch_dim: int

    def encoded(self) -> list[int]:
        shape = self.input_shape[:_MAX_DIMS]
        padding = [0] * (_MAX_DIMS - len(shape))
        numbers = (self.step, *self.hooks, self.visits, self.gather_backwards)
        return [*numbers, len(shape), *shape, *padding]

    @classmethod
    def decoded(cls, row: Sequence[int], batch_dim: int) -> StepFacts:
        step, count, digest, visits, gather_backwards, dims, *shape = row
        hooks = (count, digest)
        return cls(step, hooks, visits, gather_backwards, tuple(shape[:dims]), batch_dim)

    @property
    def shape_but_batch(self) -> tuple[int, ...]:
        at = self.batch_dim
        return self.input_shape[:at] + self.input_shape[at + 1 :]


def word_for(hooks: tuple[int, int]) -> str:
    """What a forward runs, in the word that stands for it on the board."""
    return f"{hooks[0]} hooks ({hooks[1]:08x})"


def agree(control: ControlGroup, mesh: ParallelMesh, facts: StepFacts) -> tuple[int, ...]:
    """Compare the ranks' facts; return the batch size of every rank along dp.

    Raises:
        RankDisagreementError: alike on every rank, listing what each one has.
        ConfigurationError: the inputs have no dim ``batch_dim``.
    """
    all_facts = {
        rank: StepFacts.decoded(row, facts.batch_dim)
        for rank, row in control.exchange(facts.encoded()).items()
    }
    _check(mesh, all_facts)
    if mesh.size("dp") == 1 or not facts.input_shape:
        return ()
    if facts.batch_dim >= len(facts.input_shape):
        raise ConfigurationError(
            f"batch_dim={facts.batch_dim}, but the model's input on rank {mesh.rank} has the sizes "
            f"{facts.input_shape}. Give the dim of its inputs along which the batch lies."
        )
    members = mesh.along("dp").ranks
    return tuple(all_facts[rank].input_shape[facts.batch_dim] for rank in members)


def agree_on_hooks(group: ControlGroup, mesh: ParallelMesh, labels: Sequence[str]) -> None:
    """Compare the hooks that are registered, over all stages of a pipeline.

    Raises:
        RankDisagreementError: alike on every rank, naming the hooks.
    """
    own = (len(labels), zlib.crc32("\n".join(labels).encode()))
    if mesh.watch is not None:
        mesh.watch.where = "the start of a pipeline's step"
        mesh.watch.board.describe(word_for(own), labels)
    _check_hooks(mesh, {rank: (row[0], row[1]) for rank, row in group.exchange(own).items()})


def agree_on_marks(
    mesh: ParallelMesh, marks: Mapping[str, Mark], device: torch.device
) -> dict[str, Mark]:
    """What the ranks know together of how a tensor lies.

    A rank with one sample, or none, sees less than the others; what each leaves open is compared
    along the mesh dim in question, so that all go on with the same. Collective.
    """
    return {
        name: _common(
            [_decoded(row) for row in exchanged(_encoded(mark), device, mesh.along(name))]
        )
        for name, mark in marks.items()
    }


def agree_on_length(mesh: ParallelMesh, length: int, device: torch.device) -> int:
    """The longest of the data-parallel ranks' lengths: those of an empty batch tell nothing."""
    return max(row[0] for row in exchanged([length], device, mesh.along("dp")))


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


def _check_hooks(mesh: ParallelMesh, hooks: Mapping[int, tuple[int, int]]) -> None:
    if len(set(hooks.values())) > 1 and mesh.watch is not None:
        words = {rank: word_for(own) for rank, own in hooks.items()}
        raise RankDisagreementError(
            f"Ranks disagree on which hooks are active: {difference(mesh.watch.board, words)}. "
            "Register the same hooks in the same order, with the same groups, on every rank."
        )


def _check(mesh: ParallelMesh, all_facts: Mapping[int, StepFacts]) -> None:
    def refuse(what: str, values: Mapping[int, object], way_out: str) -> None:
        if len(set(values.values())) > 1:
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in values.items())
            raise RankDisagreementError(f"Ranks disagree on {what}: {listed}. {way_out}")

    _check_hooks(mesh, {rank: facts.hooks for rank, facts in all_facts.items()})
    refuse(
        "the number of forwards so far",
        {rank: facts.step for rank, facts in all_facts.items()},
        "Every rank calls the FlexModel alike; for a forward of one rank alone call its module.",
    )
    refuse(
        "which hooked modules were called so far, and in which order",
        {rank: f"{facts.visits:08x}" for rank, facts in all_facts.items()},
        "Control flow that differs between ranks must not pass a hooked module.",
    )
    refuse(
        "how often a gathered activation got a gradient of its own",
        {rank: facts.gather_backwards for rank, facts in all_facts.items()},
        "A loss term built on a whole activation must be computed on every rank.",
    )
    refuse(
        "the input's shape besides the batch",
        {rank: facts.shape_but_batch for rank, facts in all_facts.items()},
        "Pad the ranks' batches to one length.",
    )
    for coordinate in {mesh.coordinate_of(rank, "dp") for rank in all_facts}:
        replica = [
            facts.input_shape
            for rank, facts in all_facts.items()
            if mesh.coordinate_of(rank, "dp") == coordinate
        ]
        if len(set(replica)) > 1:
            raise RankDisagreementError(
                f"Ranks of data-parallel replica {coordinate} got inputs of different shapes: "
                f"{replica}. Every rank of a replica must get the same batch."
            )
