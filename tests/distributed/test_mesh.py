"""The ranks of a job: sizes, adopted groups, parts of the world, and their order."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard

from flex_model import FlexModel, HookFunction
from flex_model.distributed.mesh import ParallelMesh, build_mesh, from_device_mesh
from flex_model.errors import ConfigurationError
from flex_model.testing.ranks import run_ranks

Sizes = dict[str, int]


def _members(mesh: ParallelMesh, name: str) -> list[int]:
    return dist.get_process_group_ranks(mesh.group(name))


# -- one process -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1, 1.0, True, "2", None])
def test_sizes_are_positive_whole_numbers(size: object) -> None:
    """Catches a size that would be multiplied, or compared, as if it were a number of ranks."""
    with pytest.raises(ConfigurationError, match="tp size must be a positive whole number"):
        build_mesh({"tp": size}, None, {}, "cpu")  # type: ignore[dict-item]


def test_more_than_one_rank_needs_a_process_group() -> None:
    """Catches a job of one process that believes to be one of two: it would wait for ever."""
    with pytest.raises(ConfigurationError, match=r"tp=2.*no process group.*torchrun"):
        build_mesh({"tp": 2}, None, {}, "cpu")
    with pytest.raises(ValueError, match="no process group"):
        FlexModel(nn.Linear(2, 2), {}, tensor_parallel_size=2)


def test_one_process_needs_no_process_group() -> None:
    """Catches a call into torch.distributed where there is none."""
    mesh = build_mesh({"pp": 1, "dp": 1, "tp": 1}, None, {}, "cpu")
    assert mesh.names == ()
    assert mesh.ranks == (0,)
    assert (mesh.rank, mesh.size("tp"), mesh.coordinate("dp")) == (0, 1, 0)


# -- two ranks ---------------------------------------------------------------------------------


def _refusals() -> None:
    for sizes in ({"tp": 4}, {"tp": 2, "dp": 2}, {"tp": 3}, {"dp": 1}, {}):
        with pytest.raises(ConfigurationError, match="the job has 2 ranks"):
            build_mesh(sizes, None, {}, "cpu")
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match=r"tp=1.*the job has 2 ranks"):
        FlexModel(model, {})
    made = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    with pytest.raises(ConfigurationError, match="not both"):
        FlexModel(model, {}, tensor_parallel_size=2, mesh=made)
    with pytest.raises(ConfigurationError, match="not both"):
        FlexModel(model, {}, process_group=dist.group.WORLD, mesh=made)
    for names in (None, ("x",), ("model",)):
        unnamed = init_device_mesh("cpu", (2,), mesh_dim_names=names)
        with pytest.raises(ConfigurationError, match="mesh_dim_names"):
            from_device_mesh(unnamed)
    with pytest.raises(ConfigurationError, match=r"tp size 4 was given.*over 2 ranks"):
        build_mesh({"tp": 4}, None, {"tp": dist.group.WORLD}, "cpu")
    with pytest.raises(ConfigurationError, match="keep=5"):
        FlexModel(model, {}, tensor_parallel_size=2, keep=5)


def test_sizes_that_do_not_fit_the_ranks_are_refused() -> None:
    """Catches a mesh that leaves ranks out, or names some that do not exist."""
    run_ranks(_refusals, 2)


def _given_mesh() -> None:
    for shape, names in [((2,), ("tp",)), ((1, 2), ("dp", "tp")), ((1, 1, 2), ("pp", "dp", "tp"))]:
        given = init_device_mesh("cpu", shape, mesh_dim_names=names)
        mesh = from_device_mesh(given)
        assert mesh.names == ("tp",)
        assert mesh.group("tp") is given.get_group("tp")
        assert mesh.ranks == (0, 1)
        assert (mesh.size("dp"), mesh.size("tp")) == (1, 2)
        assert mesh.coordinate("tp") == dist.get_rank()
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))["tp"]
    assert from_device_mesh(alone).names == ()


def test_a_device_mesh_is_taken_as_it_is() -> None:
    """Catches a group made anew beside the caller's own, and dims of one rank kept as dims."""
    run_ranks(_given_mesh, 2)


def _mesh_whose_ranks_run_backwards() -> None:
    turned = DeviceMesh("cpu", torch.tensor([1, 0]), mesh_dim_names=("tp",))
    try:
        model = FlexModel(nn.Sequential(nn.Identity()), {}, mesh=turned)
    except ConfigurationError:
        return
    hook = HookFunction(
        "0",
        editing_function=lambda module, x, save_ctx, modules: x * 1,
        placements={"tp": Shard(1)},
    )
    model.register_forward_hook(hook)
    shard = torch.arange(4.0).reshape(2, 2) + 10 * dist.get_rank()
    assert torch.equal(model(shard), shard), "the rank got another rank's shard"


def test_a_device_mesh_whose_ranks_run_backwards() -> None:
    """Catches shards joined in the order of the group (torch sorts its ranks) and taken apart in
    the order of the mesh. To refuse such a mesh is right, too.
    """
    run_ranks(_mesh_whose_ranks_run_backwards, 2)


# -- four ranks --------------------------------------------------------------------------------


def _rank_order() -> None:
    rank = dist.get_rank()
    for sizes, names, coordinates in [
        ({"dp": 2, "tp": 2}, ("dp", "tp"), (rank // 2, rank % 2)),
        ({"pp": 2, "tp": 2}, ("pp", "tp"), (rank // 2, rank % 2)),
        ({"pp": 2, "dp": 2}, ("pp", "dp"), (rank // 2, rank % 2)),
        ({"tp": 4}, ("tp",), (rank,)),
    ]:
        mesh = build_mesh(sizes, None, {}, "cpu")
        assert mesh.names == names
        assert tuple(mesh.coordinate(name) for name in names) == coordinates
        for other in range(4):
            for at, name in enumerate(names):
                due = (other // 2, other % 2)[at] if len(names) == 2 else other
                assert mesh.coordinate_of(other, name) == due
        for name in names:
            assert mesh.rank_at(name, mesh.coordinate(name)) == rank
    mesh = build_mesh({"dp": 2, "tp": 2}, None, {}, "cpu")
    assert _members(mesh, "tp") == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert _members(mesh, "dp") == [rank % 2, rank % 2 + 2]


def test_ranks_run_pp_dp_tp_with_tp_fastest() -> None:
    """Catches tensor and data dims swapped: both have two ranks, and shards of other samples would
    be joined without a complaint.
    """
    run_ranks(_rank_order, 4)


def _adopted() -> None:
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    tp = pairs[rank // 2]
    made: list[object] = []
    new_group = dist.new_group

    def counting(*args: object, **options: object) -> ProcessGroup:
        made.append(args)
        return new_group(*args, **options)  # type: ignore[arg-type]

    dist.new_group = counting
    try:
        mesh = build_mesh({"dp": 2}, None, {"tp": tp}, "cpu")
    finally:
        dist.new_group = new_group
    assert mesh.names == ("dp", "tp")
    assert mesh.group("tp") is tp
    assert _members(mesh, "dp") == [rank % 2, rank % 2 + 2]
    assert len(made) == 1, f"only the dp group was missing, made {made}"
    # A framework that lays its ranks out the other way is told so, not joined wrongly.
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    with pytest.raises(ConfigurationError, match=r"\(pp, dp, cp, tp\) order.*mesh="):
        build_mesh({"dp": 2}, None, {"tp": across}, "cpu")
    with pytest.raises(ConfigurationError, match="multiply to 2, but the job has 4 ranks"):
        build_mesh({}, None, {"tp": tp}, "cpu")


def test_groups_of_a_framework_are_adopted() -> None:
    """Catches groups made twice, and a framework's own order of ranks taken for ours."""
    run_ranks(_adopted, 4)


def _on_part_of_the_world() -> None:
    """Ranks 2 and 3 hold one model, ranks 0 and 1 another, at the same time."""
    rank = dist.get_rank()
    ours = [2, 3] if rank > 1 else [0, 1]
    groups = {0: dist.new_group([0, 1]), 2: dist.new_group([2, 3])}
    group = groups[ours[0]]
    coordinate = rank - ours[0]
    whole = torch.arange(24.0).reshape(3, 8) * (ours[0] + 1)
    shard = whole.chunk(2, 1)[coordinate].clone().requires_grad_()
    for keep, holder in (("first", ours[0]), (ours[1], ours[1])):
        records: dict[str, list[torch.Tensor]] = {}
        model = FlexModel(
            nn.Sequential(nn.Identity()),
            records,
            tensor_parallel_size=2,
            process_group=group,
            keep=keep,  # type: ignore[arg-type]
        )
        probe = nn.Linear(8, 8)
        torch.manual_seed(rank)
        nn.init.normal_(probe.weight)
        model.register_trainable_module("probe", probe)
        model.register_forward_hook(
            HookFunction(
                "0",
                editing_function=lambda module, x, save_ctx, modules: modules["probe"](x),
                placements={"tp": Shard(1)},
            )
        )
        out = model(shard)
        torch.manual_seed(ours[0])
        first = nn.init.normal_(torch.empty(8, 8))
        assert torch.equal(probe.weight, first), "the model's first rank's values are everyone's"
        due = (whole @ first.T + probe.bias).chunk(2, 1)[coordinate]
        torch.testing.assert_close(out, due)
        held = [tensor.tolist() for tensor in records.get("0", [])]
        assert held == ([whole.tolist()] if rank == holder else []), f"keep={keep}"
        model.restore()


def test_a_model_on_part_of_the_world() -> None:
    """Catches global rank 0 taken for the first of every model: a broadcast from a rank that is not
    in the group, and records that nobody keeps.
    """
    run_ranks(_on_part_of_the_world, 4)


def _two_dims_on_one_model_of_ranks_out_of_order() -> None:
    group = dist.new_group([3, 1, 0, 2])
    members = dist.get_process_group_ranks(group)
    mesh = build_mesh({"dp": 2, "tp": 2}, group, {}, "cpu")
    assert mesh.ranks == tuple(members)
    at = members.index(dist.get_rank())
    assert (mesh.coordinate("dp"), mesh.coordinate("tp")) == (at // 2, at % 2)
    assert mesh.everyone is group


def test_the_order_of_a_process_group_is_the_order_of_the_mesh() -> None:
    """Catches coordinates counted in another order than the group's own."""
    run_ranks(_two_dims_on_one_model_of_ranks_out_of_order, 4)


def _a_rank_outside() -> None:
    group = dist.new_group([2, 3])
    if dist.get_rank() > 1:
        model = FlexModel(nn.Identity(), {}, 2, process_group=group)
        assert model.restore() is not None
        return
    with pytest.raises((ConfigurationError, ValueError)) as caught:
        FlexModel(nn.Identity(), {}, 2, process_group=group)
    assert isinstance(caught.value, ConfigurationError), repr(caught.value)


def test_a_rank_outside_the_process_group_is_refused_by_name() -> None:
    """Catches torch's own error about a group this rank knows nothing of."""
    run_ranks(_a_rank_outside, 4)
