"""Every rule, on every cut, against the same program on the whole tensor."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from operations import OPERATIONS, Operation
from simulated_ranks import Claims, Operand, Program, fake_group, joined, part_of, values
from torch import Tensor

from flex_model.layouts.marks import FOREIGN, TERM, UNKNOWN, WHOLE, Cut
from flex_model.layouts.trace import LayoutTrace

ROWS = [row for rows in OPERATIONS.values() for row in rows]


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def group(request: pytest.FixtureRequest) -> Iterator[dist.ProcessGroup]:
    with fake_group(request.param) as made:
        yield made


def _claims(row: Operation, group: dist.ProcessGroup, **how: object) -> Claims:
    if group.size() not in row.ranks:
        pytest.skip("the row is for another number of ranks")
    return Claims(row.program, row.operands, group, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_mark_joins_the_shards_to_the_whole_result(
    row: Operation, group: dist.ProcessGroup
) -> None:
    """Catches a rule that is wrong on some cut, or no longer there."""
    claims = _claims(row, group)
    claims.check()
    assert claims.known or not row.known, f"UNKNOWN, where {row} can be followed"


@pytest.mark.parametrize("kind", OPERATIONS)
@pytest.mark.parametrize("how", ["autograd", "no_grad", "inference_mode"])
def test_the_same_is_known_however_it_runs(kind: str, how: str, group: dist.ProcessGroup) -> None:
    """Catches a rule that holds only for the operations one mode breaks a program down to:
    inference mode hands over ``linear``, ``matmul`` and ``softmax`` as they are called.
    """
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    options = {"mode": modes[how]} if how in modes else {"requires_grad": True}
    wrong = []
    for row in OPERATIONS[kind]:
        if group.size() not in row.ranks or (how == "autograd" and "out=" in row.name):
            continue
        plain = Claims(row.program, row.operands, group)
        try:
            other = Claims(row.program, row.operands, group, **options)  # type: ignore[arg-type]
        except (RuntimeError, TypeError) as error:
            wrong.append(f"{row}: {error}")
            continue
        if other.marks != plain.marks:
            wrong.append(f"{row}: {other.marks} in place of {plain.marks}")
    assert not wrong, f"{len(wrong)} rows differ:\n" + "\n".join(wrong)


def _squeezed(at: int) -> Program:
    return lambda x: x.clone().squeeze_(at)


@pytest.mark.parametrize(
    ("program", "operand"),
    [
        (lambda x: x.clone().transpose_(0, 1), (values(6, 12), Cut(1))),
        (lambda x: x.clone().unsqueeze_(0), (values(6, 12), Cut(1))),
        (_squeezed(0), (values(1, 6, 1), Cut(1))),
        (_squeezed(1), (values(3, 1, 6, 1), Cut(2))),
        (_squeezed(-2), (values(3, 1, 6), Cut(2))),
        (lambda x: x.clone().t_(), (values(6, 12), Cut(1))),
        (lambda x: x.clone().resize_(2, 2), (values(6, 12), Cut(1))),
    ],
)
def test_operations_that_change_the_shape_in_place(
    program: Program, operand: Operand, group: dist.ProcessGroup
) -> None:
    """Catches a rule that reads the operand's shape after the operation has changed it."""
    Claims(program, [operand], group).check()


def _filled_by_slices(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape)
    out[:, ::2] = x[:, ::2]
    return out * 1


def _filled_by_rows(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[1], x.shape[0])
    for at, row in enumerate(out):
        row.copy_(x[:, at])
    return out * 1


def _added_to_through_a_view(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape)
    out.view(-1).add_(x.view(-1))
    return out * 1


def _filled_and_summed(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape)
    out[:, 0] = x[:, 1]
    return out.sum(0)


def _overwritten_in_part(x: Tensor) -> Tensor:
    out = x.clone()
    out[..., :2] = 0
    return out * 1


def _viewed_before_it_is_filled(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape)
    view = out.mT
    out.copy_(x)
    return view * 1


@pytest.mark.parametrize(
    "program",
    [
        _filled_by_slices,
        _filled_by_rows,
        _added_to_through_a_view,
        _filled_and_summed,
        _overwritten_in_part,
        _viewed_before_it_is_filled,
    ],
)
def test_a_tensor_is_what_is_written_into_its_views(
    program: Program, group: dist.ProcessGroup
) -> None:
    """Catches a buffer that keeps the mark of its empty state (WHOLE: zeros are alike everywhere)
    when shards are written into it through slices, as caches and routed experts do.
    """
    Claims(program, [(values(6, 12), Cut(0))], group).check()


@pytest.mark.parametrize(
    "program",
    [
        lambda x: (x.transpose(0, 1) * 1, x * 1),
        lambda x: [y * 1 for y in (x.unsqueeze(0), x.unsqueeze(1), x.unsqueeze(0))],
        lambda x: [y * 1 for y in (x.permute(2, 1, 0), x)],
    ],
)
def test_views_of_dims_of_length_one_are_kept_apart(
    program: Program, group: dist.ProcessGroup
) -> None:
    """Catches two views, cut along different dims, taken for one because they lie at one address
    with equal shape and strides: one sample and one token (or head) to a rank.
    """
    Claims(program, [(values(group.size(), 1, 1), Cut(0))], group).check()


def test_unlike_views_of_one_row_are_kept_apart(group: dist.ProcessGroup) -> None:
    """As above, for a mask of one sample that is given its head and query dims both ways."""
    operand = (values(group.size(), 6), Cut(0))
    Claims(lambda x: [y * 1 for y in (x[None], x[:, None], x[None])], [operand], group).check()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_tensors_without_entries(dim: int, group: dist.ProcessGroup) -> None:
    """Catches empty tensors taken for one another: they all lie at address zero."""
    empty = (torch.zeros(6, 6, 6)[:, :0], Cut(dim)) if dim != 1 else (torch.zeros(6, 6, 0), Cut(1))

    def program(x: Tensor) -> tuple[Tensor, ...]:
        return x * 1, x.transpose(0, 2) * 1, x * 1, torch.cat([x, x]) if dim else x.mT * 1

    Claims(program, [empty], group).check()


def test_a_freed_tensors_mark_dies_with_it(group: dist.ProcessGroup) -> None:
    """Catches a constant that is given the mark of a tensor that lay at its address before."""

    def program(x: Tensor) -> list[Tensor]:
        made = []
        for number in range(20):
            x.sum()
            (x * 2).sum(0, keepdim=True)
            made += [torch.tensor(float(number)) * 1, torch.tensor([float(number)]) * 1]
        return made

    claims = Claims(program, [(values(6), Cut(0))], group)
    claims.check()
    assert all(mark in (WHOLE, FOREIGN) for mark in claims.marks)


def test_a_tensor_made_unwatched_is_not_known_by_its_address(group: dist.ProcessGroup) -> None:
    """Catches the same for what an edit makes while the trace is paused."""
    trace = LayoutTrace({"tp": group}, lambda tensor: {})
    x = values(64)
    trace.mark(x, {"tp": Cut(0)})
    with trace:
        addresses = set()
        for _ in range(20):
            followed = x * 2
            addresses.add(followed.data_ptr())
            del followed
        with trace.paused():
            kept = [values(64) for _ in range(40)]
        reused = [tensor for tensor in kept if tensor.data_ptr() in addresses]
        marks = {trace.marks_of(tensor)["tp"] for tensor in reused}
    assert marks <= {FOREIGN, UNKNOWN}


def test_a_program_that_stays_on_part_of_the_shard_is_not_claimed(
    group: dist.ProcessGroup,
) -> None:
    """Catches a slice of a cut dim taken for no slice because it is as long as the shard.

    Written as an operation: torch runs none for an index that keeps every local entry, so there
    nothing can be seen.
    """
    own = 12 // group.size()
    for program in (
        lambda x: x.narrow(1, 0, own) * 1,
        lambda x: torch.ops.aten.slice(x, 1, -own, 12) * 1,
    ):
        Claims(program, [(values(6, 12), Cut(1))], group).check()
    kept = Claims(lambda x: x[:, 0:] * 1, [(values(6, 12), Cut(1))], group)
    kept.check()
    assert kept.known


def test_a_step_of_a_whole_model_is_followed_from_end_to_end(group: dist.ProcessGroup) -> None:
    """Catches a gap between rules that are each right: two layers on a batch, with and without
    autograd, and on heads and features.
    """

    def block(x: Tensor, wq: Tensor, wo: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
        normed = F.rms_norm(x, x.shape[-1:])
        heads = F.linear(normed, wq).unflatten(-1, (-1, 4)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        joined_heads = mixed.transpose(1, 2).flatten(2)
        partial_out = F.linear(joined_heads, wo)
        inner = F.silu(F.linear(normed, up))
        return [heads, mixed, joined_heads, partial_out, inner, F.linear(inner, down)]

    weights = [values(24, 24), values(24, 24), values(36, 24), values(24, 36)]
    weights = [weight / weight.max() for weight in weights]
    x = values(6, 5, 24) / 100
    whole = [(weight, WHOLE) for weight in weights]
    cuts = zip(weights, (Cut(0), Cut(1), Cut(0), Cut(1)), strict=True)
    due_on_heads = [Cut(1), Cut(1), Cut(2), TERM, Cut(2), TERM]
    for requires_grad in (False, True):
        on_batch = Claims(block, [(x, Cut(0)), *whole], group, requires_grad=requires_grad)
        on_batch.check()
        assert on_batch.marks == [Cut(0)] * 6
        operands = (
            [(x, WHOLE), *cuts]
            if not requires_grad
            else [(x, WHOLE), *zip(weights, (Cut(0), Cut(1), Cut(0), Cut(1)), strict=True)]
        )
        on_heads = Claims(block, operands, group, requires_grad=requires_grad)
        on_heads.check()
        assert on_heads.marks == due_on_heads


def test_cutting_and_joining_by_hand() -> None:
    """Catches a harness that would call anything right: parts differ and join to the whole."""
    whole = values(4, 12)
    for mark in (Cut(0), Cut(1), Cut(1, 2), Cut(1, 3), TERM, WHOLE):
        parts = [part_of(whole, mark, rank, 2) for rank in range(2)]
        assert torch.equal(parts[0], parts[1]) == (mark is WHOLE)
        assert torch.equal(joined(mark, parts), whole)
    wrong = [part_of(whole, Cut(1, 2), rank, 2) for rank in range(2)]
    assert not torch.equal(joined(Cut(1), wrong), whole)
