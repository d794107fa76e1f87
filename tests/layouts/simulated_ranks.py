"""N ranks played by one process, one after the other, for tests of layouts.

A whole tensor is cut into local ones and joined again here by reshaping alone, so that nothing of
the library under test has a part in what is called right.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from flex_model.layouts.marks import FOREIGN, TERM, UNKNOWN, WHOLE, Cut, Mark, OneOf
from flex_model.layouts.trace import LayoutTrace

Operand = tuple[Tensor, Mark]
Program = Callable[..., Any]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """No two entries alike, so a swapped or repeated shard shows."""
    count = int(torch.tensor(shape).prod())
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return (order.reshape(shape) + 1).to(dtype)


def part_of(whole: Tensor, mark: Mark, rank: int, ranks: int) -> Tensor:
    """What one rank holds of a whole tensor."""
    if isinstance(mark, Cut):
        blocks = whole.unflatten(mark.dim, (mark.outer, ranks, -1))
        return blocks.select(mark.dim + 1, rank).flatten(mark.dim, mark.dim + 1).clone()
    if mark is TERM:
        generator = torch.Generator().manual_seed(1)
        terms = torch.randint(-9, 9, (ranks - 1, *whole.shape), generator=generator)
        terms = terms.to(whole.dtype)
        return (terms[rank] if rank < ranks - 1 else whole - terms.sum(0)).clone()
    return whole.clone()


def joined(mark: Mark, parts: Sequence[Tensor]) -> Tensor:
    """The whole tensor that a mark says the ranks' parts are."""
    if isinstance(mark, Cut):
        blocks = [part.unflatten(mark.dim, (mark.outer, -1)) for part in parts]
        return torch.cat(blocks, mark.dim + 1).flatten(mark.dim, mark.dim + 1)
    if mark is TERM:
        return sum(parts[1:], start=parts[0])
    assert mark is WHOLE, f"{mark} claims nothing that could be joined"
    assert all(torch.equal(part, parts[0]) for part in parts), "marked WHOLE, but the ranks differ"
    return parts[0]


@contextmanager
def fake_group(ranks: int) -> Iterator[dist.ProcessGroup]:
    """A group that a trace can be told of; nothing is ever sent over it."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


class Claims:
    """A program's outputs on a whole tensor, and what was claimed of them on the ranks."""

    def __init__(
        self,
        program: Program,
        operands: Sequence[Operand],
        group: dist.ProcessGroup,
        *,
        requires_grad: bool = False,
        mode: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        ranks = group.size()
        with mode():
            wholes = [_leaf(whole.clone(), requires_grad) for whole, _ in operands]
            self.truths = _tensors(program(*wholes))
        by_rank = []
        for rank in range(ranks):
            trace = LayoutTrace({"tp": group}, lambda tensor: {})
            with mode():
                parts = [_leaf(part_of(w, m, rank, ranks), requires_grad) for w, m in operands]
                for part, (_, mark) in zip(parts, operands, strict=True):
                    trace.mark(part, {"tp": mark})
                with trace:
                    outs = _tensors(program(*parts))
                    marks = [trace.marks_of(out)["tp"] for out in outs]
            by_rank.append((outs, marks))
        self.parts = [list(same) for same in zip(*(outs for outs, _ in by_rank), strict=True)]
        self._marks = [set(same) for same in zip(*(marks for _, marks in by_rank), strict=True)]

    @property
    def marks(self) -> list[Mark]:
        """One mark for each output."""
        assert all(len(found) == 1 for found in self._marks), f"ranks disagree: {self._marks}"
        return [next(iter(found)) for found in self._marks]

    @property
    def known(self) -> bool:
        """Whether something is claimed of every output."""
        return not any(mark in (UNKNOWN, FOREIGN) for mark in self.marks)

    def check(self) -> None:
        """Every claim joins the ranks' outputs to the whole tensor's."""
        assert len(self.parts) == len(self.truths)
        for mark, parts, truth in zip(self.marks, self.parts, self.truths, strict=True):
            if mark in (UNKNOWN, FOREIGN):
                continue
            if isinstance(mark, OneOf):
                assert any(_joins(cut, parts, truth) for cut in mark.cuts), (
                    f"none of {mark} is true"
                )
                continue
            whole = joined(mark, parts)
            assert whole.shape == truth.shape, f"{mark}: {tuple(whole.shape)}, {truth.shape} is due"
            # Joined shards are equal to the bit; a sum over ranks is reordered.
            torch.testing.assert_close(whole, truth, rtol=1e-5, atol=1e-5, equal_nan=True)


def _joins(cut: Cut, parts: Sequence[Tensor], truth: Tensor) -> bool:
    whole = joined(cut, parts)
    return whole.shape == truth.shape and torch.allclose(whole, truth, equal_nan=True)


def _leaf(tensor: Tensor, requires_grad: bool) -> Tensor:
    return tensor.requires_grad_(requires_grad and tensor.is_floating_point())


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
