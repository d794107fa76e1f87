"""Gather and re-shard against the whole tensor, for every row of the routing table."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import (
    Case,
    Collectives,
    Way,
    cut_in_zigzag,
    is_cut,
    rows,
    sharded_cases,
    summed_over_ranks,
    values,
)
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from flex_model.distributed.collectives import slice_along
from flex_model.distributed.mesh import ParallelMesh, build_mesh
from flex_model.distributed.routing import assemble, assemble_on, disassemble
from flex_model.testing.ranks import run_ranks

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int16,
    torch.bool,
    torch.complex64,
    torch.complex128,
]
MESHES = [{"tp": 2}, {"dp": 2, "tp": 2}, {"tp": 4}, {"cp": 2}, {"cp": 2, "tp": 2}]


def _mesh(sizes: dict[str, int]) -> ParallelMesh:
    return build_mesh(sizes, None, {}, "cpu")


def _ranks(sizes: dict[str, int]) -> int:
    return torch.tensor(list(sizes.values())).prod().item()


def _equal(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype, what
    assert torch.equal(actual, expected), f"{what}:\n{actual}\nis not\n{expected}"


# -- values ------------------------------------------------------------------------------------


def _shards_join_and_part(sizes: dict[str, int]) -> None:
    mesh = _mesh(sizes)
    for dtype in DTYPES:
        for case in sharded_cases(mesh, 25, dtype):
            local, what = case.part(case.whole), f"{dtype} {case.ways}"
            _equal(assemble(local, case.layout, mesh), case.whole, f"gather, {what}")
            _equal(disassemble(case.whole, case.layout, mesh), local, f"re-shard, {what}")
            with torch.no_grad():
                whole = case.gather(local)
                _equal(whole, case.whole, f"gather, {what}")
                back = case.reshard(whole)
            _equal(back, local, f"re-shard of gather, {what}")
            assert back.is_contiguous(), f"frameworks view what layers return: {what}"
            strided = torch.empty(*reversed(local.shape), dtype=dtype).permute(
                *reversed(range(local.ndim))
            )
            strided.copy_(local)
            _equal(assemble(strided, case.layout, mesh), case.whole, f"strided, {what}")


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_shards_of_every_shape_and_dtype_join_to_the_whole(sizes: dict[str, int]) -> None:
    """Catches shards in the wrong order, blocks grouped by rank, padding left in, and dtypes that a
    backend cannot send; re-sharding what was gathered gives the shard bit for bit.
    """
    run_ranks(_shards_join_and_part, _ranks(sizes), sizes)


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(0, 2))
def test_zigzag_parts_hold_each_entry_once(ranks: int, blocks: int, chunk: int, dim: int) -> None:
    """Catches a chunk that two ranks hold or none, or blocks joined across; empty ones too."""
    shape = [2, 2, 2]
    shape[dim] = 2 * ranks * blocks * chunk
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    parts = [
        slice_along(whole, dim, rank, ranks, blocks=blocks, zigzag=True) for rank in range(ranks)
    ]
    placement = _StridedShard(dim, split_factor=blocks)
    for rank, part in enumerate(parts):
        _equal(part, cut_in_zigzag(whole, placement, ranks, rank), f"part of rank {rank}")
        assert part.is_contiguous()
    assert torch.equal(torch.cat(parts).flatten().sort().values, whole.flatten())


def _three_ranks_in_zigzag() -> None:
    mesh = _mesh({"cp": 3})
    for case in sharded_cases(mesh, 10, torch.float32):
        local = case.part(case.whole)
        _equal(assemble(local, case.layout, mesh), case.whole, f"gather, {case.ways}")
        _equal(disassemble(case.whole, case.layout, mesh), local, f"re-shard, {case.ways}")


def test_an_odd_number_of_ranks_in_zigzag() -> None:
    """Catches an order that comes out right only where going there and back looks alike."""
    run_ranks(_three_ranks_in_zigzag, 3)


def _one_rank_gets_the_whole(sizes: dict[str, int]) -> None:
    mesh = _mesh(sizes)
    made = [case for dtype in (torch.float32, torch.bool) for case in sharded_cases(mesh, 8, dtype)]
    for case in [*made, *rows(mesh)]:
        for rank in range(dist.get_world_size()):
            whole = assemble_on(case.part(case.whole), case.layout, mesh, rank)
            if rank == dist.get_rank():
                assert whole is not None, case.ways
                _equal(whole, case.whole, f"on rank {rank}, {case.ways}")
            else:
                assert whole is None, f"rank {rank} alone keeps records, {case.ways}"


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_gather_to_one_rank(sizes: dict[str, int]) -> None:
    """Catches a whole tensor on the wrong rank, or on more than one; ranks whose part is the same
    as another's must not wait for a collective that they have no part in.
    """
    run_ranks(_one_rank_gets_the_whole, _ranks(sizes), sizes)


def _never_an_alias() -> None:
    mesh = _mesh({"tp": 2})
    for case in rows(mesh):
        local = case.part(case.whole)
        before = local.clone()
        for source in (local, local.clone().requires_grad_()):
            case.gather(source).detach().fill_(77)
            _equal(source.detach(), before, f"the shard, after an edit in place, {case.ways}")


def test_a_gathered_tensor_is_never_the_shard_itself() -> None:
    """Catches an edit in place that rewrites what the model holds."""
    run_ranks(_never_an_alias, 2)


# -- gradients ---------------------------------------------------------------------------------


def _backward_is_as_defined(sizes: dict[str, int]) -> None:
    mesh = _mesh(sizes)
    weight = values((8, 8, 3), seed=8)
    for case in rows(mesh):
        # Backward of gather: this rank's part of the whole gradient, by the gradient's placement.
        local = case.part(case.whole).requires_grad_()
        (case.gather(local) * weight).sum().backward()
        due = _taken_apart(case, weight)
        assert local.grad is not None
        _equal(local.grad, due, f"gather's backward, {case.ways}")
        # Backward of re-shard: the whole gradient, on every rank.
        whole = case.whole.clone().requires_grad_()
        case.reshard(whole).backward(case.part(weight, of="gradient"))
        assert whole.grad is not None
        _equal(whole.grad, weight, f"re-shard's backward, {case.ways}")


def _taken_apart(case: Case, gradient: Tensor) -> Tensor:
    """What a rank holds of a whole gradient where this library chooses: a term of a sum is all of
    it on coordinate 0, and none elsewhere.
    """
    for way in case.ways:
        if isinstance(way.gradient, Partial) and way.gradient.reduce_op == "sum":
            if case.mesh.coordinate(way.dim) != 0:
                gradient = torch.zeros_like(gradient)
        elif is_cut(way.gradient):
            own = Case(gradient, (way,), case.mesh)
            gradient = own.part(gradient) * way.gradient_scale
        gradient = gradient / way.gradient_scale
    return gradient


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_backward_by_the_table(sizes: dict[str, int]) -> None:
    """Catches the field's classic: an all-gather without a backward, or one that keeps only this
    rank's term of the gradient.
    """
    run_ranks(_backward_is_as_defined, _ranks(sizes), sizes)


def _adjoint(sizes: dict[str, int]) -> None:
    mesh = _mesh(sizes)
    for case in rows(mesh):
        whole, other = values((8, 8, 3), seed=1), values((8, 8, 3), seed=2)
        held = case.part(other, of="gradient")
        # Ranks that hold the same thing and say so are counted once.
        copies = 1
        for way in case.ways:
            if isinstance(way.value, Replicate) and isinstance(way.gradient, Replicate):
                copies *= mesh.size(way.dim)
        leaf = whole.clone().requires_grad_()
        local = case.reshard(leaf)
        local.backward(held)
        assert leaf.grad is not None
        left = summed_over_ranks((local * held).sum()) / copies
        _equal(
            left, (whole * leaf.grad).sum(), f"re-shard is no adjoint of its backward, {case.ways}"
        )
        part = case.part(whole).requires_grad_()
        gathered = case.gather(part)
        gathered.backward(other)
        assert part.grad is not None
        right = summed_over_ranks((part * part.grad).sum()) / copies
        _equal(
            (gathered * other).sum(), right, f"gather is no adjoint of its backward, {case.ways}"
        )


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_maps_and_their_backwards_are_adjoint(sizes: dict[str, int]) -> None:
    """Catches a backward that is self-consistent but not the transpose: the inner product of what
    the ranks hold must not change as it passes.
    """
    run_ranks(_adjoint, _ranks(sizes), sizes)


def _second_derivatives(sizes: dict[str, int]) -> None:
    mesh = _mesh(sizes)
    for case in rows(mesh):
        value = case.whole / 8
        weight = values((3, 3), seed=3) / 8

        def twice(whole: Tensor, weight: Tensor = weight) -> Tensor:
            return torch.tanh(whole @ weight).pow(2).sum()

        plain = value.clone().requires_grad_()
        (first,) = torch.autograd.grad(twice(plain), plain, create_graph=True)
        first.pow(3).sum().backward()
        assert plain.grad is not None
        # The same through the ranks: a leaf on each, gathered, differentiated, gathered again.
        part = case.part(value).requires_grad_()
        (own,) = torch.autograd.grad(twice(case.gather(part)), part, create_graph=True)
        turned = Case(value, case.ways, mesh)
        whole_gradient = _gathered_gradient(turned, own)
        torch.testing.assert_close(whole_gradient, first)
        whole_gradient.pow(3).sum().backward()
        assert part.grad is not None
        torch.testing.assert_close(part.grad, _taken_apart(case, plain.grad), msg=str(case.ways))


def _gathered_gradient(case: Case, gradient: Tensor) -> Tensor:
    """A gradient's own gather: the layout turned round."""
    ways = tuple(Way(way.dim, way.gradient, way.value) for way in case.ways)
    return Case(case.whole, ways, case.mesh).gather(gradient)


@pytest.mark.parametrize("sizes", MESHES[:2], ids=str)
def test_double_backward_equals_one_process(sizes: dict[str, int]) -> None:
    """Catches a backward that is right once but is no differentiable function itself."""
    run_ranks(_second_derivatives, _ranks(sizes), sizes)


def _double_backward_through_reshard() -> None:
    mesh = _mesh({"tp": 2})
    case = next(iter(rows(mesh)))
    value = case.whole / 8
    plain = value.clone().requires_grad_()
    (first,) = torch.autograd.grad(plain.sin().sum() + plain.pow(3).sum(), plain, create_graph=True)
    first.pow(2).sum().backward()
    leaf = value.clone().requires_grad_()
    local = case.reshard(leaf)
    loss = local.sin().sum() + local.pow(3).sum()  # this rank's term
    (second,) = torch.autograd.grad(loss, leaf, create_graph=True)
    torch.testing.assert_close(second, first)
    second.pow(2).sum().backward()
    torch.testing.assert_close(leaf.grad, plain.grad)


def test_double_backward_through_a_reshard() -> None:
    """Catches the same on the way back: the second derivative passes gather's backward."""
    run_ranks(_double_backward_through_reshard, 2)


# -- data-parallel losses ----------------------------------------------------------------------


def _data_parallel(loss: str) -> None:
    mesh = _mesh({"dp": 2})
    scale = 0.5 if loss == "mean" else 1.0
    whole, weight = values((6, 4), seed=3), values((6, 4), seed=4)
    sharded = Way("dp", Shard(0), Shard(0), None, scale)
    ragged = Way("dp", Shard(0), Shard(0), (4, 2), scale)
    replicated = Way("dp", Replicate(), Partial("avg" if loss == "mean" else "sum"))
    for way in (sharded, ragged, replicated):
        case = Case(whole, (way,), mesh)
        # One process takes the mean (sum) of the ranks' losses; each rank differentiates its own.
        leaf = whole.clone().requires_grad_()
        local = case.reshard(leaf)
        own_weight = case.part(weight) if way is not replicated else weight * (mesh.rank + 1)
        (local * own_weight).sum().backward()
        due = weight * scale if way is not replicated else weight * 3 * scale
        _equal(leaf.grad, due, f"the gradient of the one loss, {way}")
        # Outside the edit each rank keeps its own: the part, times the number of ranks if averaged.
        part = case.part(whole).requires_grad_()
        case.gather(part).backward(due)
        rank_own = {sharded: own_weight, ragged: own_weight, replicated: due}[way]
        if way is replicated and loss == "sum":
            rank_own = due if mesh.rank == 0 else torch.zeros_like(due)
        _equal(part.grad, rank_own, f"a rank's own gradient, {way}")


@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_data_parallel_factors(loss: str) -> None:
    """Catches a factor of the number of ranks, once too often or not at all."""
    run_ranks(_data_parallel, 2, loss)


# -- traffic -----------------------------------------------------------------------------------


def _collectives_of(case: Case) -> dict[str, list[str]]:
    found = {}
    local = case.part(case.whole).requires_grad_()
    with Collectives() as count:
        whole = case.gather(local)
    found["gather"] = count.names
    with Collectives() as count:
        whole.sum().backward()
    found["gather's backward"] = count.names
    leaf = case.whole.clone().requires_grad_()
    with Collectives() as count:
        out = case.reshard(leaf)
    found["re-shard"] = count.names
    with Collectives() as count:
        out.backward(case.part(case.whole, of="gradient"))
    found["re-shard's backward"] = count.names
    return found


def _traffic() -> None:
    mesh = _mesh({"tp": 2})
    for case in rows(mesh):
        (way,) = case.ways
        found = _collectives_of(case)
        nothing: list[str] = []
        sharded = is_cut(way.value)
        moved = {"value": len(found["gather"]), "gradient": len(found["re-shard's backward"])}
        assert moved["value"] == (sharded or isinstance(way.value, Partial)), (case.ways, found)
        assert moved["gradient"] == (sharded or isinstance(way.gradient, Partial)), (
            case.ways,
            found,
        )
        assert found["re-shard"] == found["gather's backward"] == nothing, (case.ways, found)


def test_what_must_move_moves_once() -> None:
    """Catches a second collective, or one where a slice would do: an edit of a shard is one gather
    forward and one backward.
    """
    run_ranks(_traffic, 2)


def _bytes_of_a_gather() -> None:
    mesh = _mesh({"tp": 2})
    sent: list[int] = []
    original = dist.all_gather_single

    def counted(out: Tensor, part: Tensor, **options: object) -> object:
        sent.append(part.numel() * part.element_size())
        return original(out, part, **options)

    dist.all_gather_single = counted
    try:
        for dtype in DTYPES:
            case = Case(values((4, 6), dtype), (Way("tp", Shard(1), Shard(1)),), mesh)
            assemble(case.part(case.whole), case.layout, mesh)
            shard = 12 * torch.empty((), dtype=dtype).element_size()
            assert sent == [shard], f"{dtype}: {sent} bytes for a shard of {shard}"
            sent.clear()
    finally:
        dist.all_gather_single = original


def test_a_gather_sends_the_shard_and_no_more() -> None:
    """Catches dtypes widened for the wire, or a whole tensor sent in place of a shard."""
    run_ranks(_bytes_of_a_gather, 2)
