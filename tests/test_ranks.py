"""The harness that every test of many ranks stands on."""

import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from flex_model.testing import ranks
from flex_model.testing.ranks import RankFailure, RankPool, run_ranks


def _sum_of_ranks(offset):
    value = torch.full((3,), dist.get_rank() + offset)
    dist.all_reduce(value)
    return value


def _process_id():
    return os.getpid()


def _rank_one_raises():
    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()


def _rank_one_sleeps():
    if dist.get_rank() == 1:
        time.sleep(600)


def _rank_one_dies():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), 9)
    dist.barrier()


def _environment():
    return {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def _gathered_over(dims, groups_before):
    """Whether a DTensor over a mesh works after that many other groups have been made."""
    for _ in range(groups_before):
        dist.new_group([0, 1, 2, 3])
    mesh = init_device_mesh("cpu", dims, mesh_dim_names=("dp", "tp"))
    whole = torch.arange(8.0).reshape(4, 2)
    cut = distribute_tensor(whole, mesh, [Replicate(), Shard(0)])
    return torch.equal((cut * 2).full_tensor(), whole * 2)


def _random_number():
    return torch.rand(1).item()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_returns_its_result(world_size):
    results = run_ranks(_sum_of_ranks, world_size, offset=0.5)
    due = torch.full((3,), sum(range(world_size)) + 0.5 * world_size)
    assert len(results) == world_size
    assert all(torch.equal(result, due) for result in results)


def test_processes_are_reused_and_a_fresh_call_has_its_own():
    first, second = run_ranks(_process_id, 2), run_ranks(_process_id, 2)
    assert first == second
    assert not set(first) & set(run_ranks(_process_id, 2, fresh=True))
    assert run_ranks(_process_id, 2) == first


def test_a_reused_process_starts_from_the_same_seed():
    assert run_ranks(_random_number, 2) == run_ranks(_random_number, 2)


def test_a_reused_process_has_forgotten_the_meshes_of_an_earlier_body():
    # Torch caches equal meshes; the groups of the second have other names than the first's.
    assert run_ranks(_gathered_over, 4, (2, 2), 0) == [True] * 4
    assert run_ranks(_gathered_over, 4, (2, 2), 3) == [True] * 4


def test_ranks_see_what_torchrun_would_set():
    assert run_ranks(_environment, 2) == [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)
    ]


def test_a_failing_rank_is_shown_with_its_rank_and_frees_the_others():
    start = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        run_ranks(_rank_one_raises, 2)
    assert time.monotonic() - start < 10
    assert next(iter(caught.value.failures)) == 1
    assert caught.value.failures[1].kind == "ValueError"
    assert "rank 1: ValueError: the reason" in str(caught.value)
    assert "in _rank_one_raises" in str(caught.value)
    assert run_ranks(_process_id, 2), "the next call finds working ranks"


def test_a_stuck_rank_ends_in_seconds_and_its_stack_is_shown():
    start = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        run_ranks(_rank_one_sleeps, 2, timeout=5, fresh=True)
    assert time.monotonic() - start < 20
    assert caught.value.failures[1].kind == "Stuck"
    assert "_rank_one_sleeps" in caught.value.failures[1].traceback


def test_a_rank_that_dies_is_told_by_its_exit_code():
    with pytest.raises(RankFailure) as caught:
        run_ranks(_rank_one_dies, 2, fresh=True)
    assert caught.value.failures[1].kind == "Died"
    assert "-9" in caught.value.failures[1].message


def _sleep_and_tell(folder):
    (Path(folder) / f"{dist.get_rank()}.pid").write_text(str(os.getpid()))
    time.sleep(600)


def _alive(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path):
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_ranks as t; "
    code += f"t.run_ranks(t._sleep_and_tell, 2, {str(tmp_path)!r})"
    launcher = subprocess.Popen([sys.executable, "-c", code])
    files = [tmp_path / f"{rank}.pid" for rank in range(2)]
    _wait_until(lambda: all(file.exists() and file.read_text() for file in files), 60)
    launcher.kill()
    launcher.wait()
    _wait_until(lambda: not any(_alive(file.read_text()) for file in files), 20)


def _wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_an_interrupted_call_leaves_nothing_for_the_next():
    with pytest.raises(KeyboardInterrupt), patch.object(ranks, "wait", side_effect=_interrupt):
        run_ranks(_sum_of_ranks, 2, offset=9.0)
    assert run_ranks(_sum_of_ranks, 2, offset=0.0)[0].tolist() == [1.0, 1.0, 1.0]


def _interrupt(*_):
    raise KeyboardInterrupt


def test_a_body_that_cannot_be_sent_is_refused_here():
    with pytest.raises(TypeError, match="top level of a module"):
        run_ranks(lambda: None, 2)


def test_a_closed_pool_leaves_no_process():
    pool = RankPool()
    pool.run(_process_id, 2, (), {}, 60.0)
    ids = pool.process_ids()
    pool.close()
    for process_id in ids:
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)
