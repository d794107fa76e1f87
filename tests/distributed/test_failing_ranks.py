"""A rank fails, is killed, stands still or goes another way: the others say so within seconds.

Each job runs real processes (see `failing_ranks`) that end as a program ends. With ``-s`` the
seconds from each fault to each rank's error are printed as a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from failing_ranks import SIZES, Rank, print_table, run_jobs
from rich.console import Console

SECONDS = 10.0
BOTH = ("tp", "dp", "2x2")


@dataclass(frozen=True)
class Fault:
    """A function of `failing_job`, and what the ranks that survive it must say.

    Attributes:
        name: the function.
        kind: class of their error.
        words: in its text, besides the number of the rank that failed.
        layouts: where it is tried.
        code: exit code of the rank that failed; None where that has to be ended from outside.
        raw: ranks that wait in a collective of the framework's only, outside of FlexModel.
    """

    name: str
    kind: str
    words: tuple[str, ...]
    layouts: tuple[str, ...] = ("dp", "2x2")
    code: int | None = 1
    raw: str = ""


FAILED, DISAGREE = "RankFailedError", "RankDisagreementError"
ALIKE = "Every rank must call"
FAULTS = (
    Fault("edit_raises", FAILED, ("1.up", "ValueError: the reason"), BOTH),
    Fault("edit_returns_none", FAILED, ("1.up", "EditError", "returned None")),
    Fault("edit_returns_wrong_shape", FAILED, ("0.up", "EditError", "returned shape"), BOTH),
    Fault("backward_hook_raises", FAILED, ("1 full_backward", "ValueError: the reason"), BOTH),
    Fault("model_raises", FAILED, ("the model's forward", "ValueError: the reason")),
    Fault("model_raises_in_generate", FAILED, ("the model's forward", "ValueError: the reason")),
    Fault("data_loading_raises", FAILED, ("failing_job.py", "ValueError: the reason")),
    Fault("unknown_group", FAILED, ("hook groups", "GroupError", "no such group")),
    Fault("registers_unknown_module", FAILED, ("UnknownModuleError", "1.norn"), ("2x2",)),
    Fault("fails_under_another_flex_model", FAILED, ("ValueError: the reason",)),
    Fault("fails_before_another_flex_model", FAILED, ("construction", "ValueError: the reason")),
    Fault("killed_in_our_gather", FAILED, ("1.up", "was killed"), BOTH, code=-9),
    Fault("killed_in_framework", FAILED, ("was killed",), BOTH, code=-9),
    Fault("killed_between_forwards", FAILED, ("the start of forward 1", "was killed"), code=-9),
    Fault("killed_before_a_transfer", FAILED, ("was killed",), code=-9),
    Fault("killed_with_the_store", FAILED, ("1.up", "store", "is gone"), BOTH, code=-9),
    Fault("stands_still", FAILED, ("1.up", "is stopped"), BOTH, code=None),
    Fault("exits_early", DISAGREE, ("has ended its program",), BOTH, code=0),
    Fault("exits_without_leaving", DISAGREE, ("has ended its program",), code=0),
    Fault("restores_and_goes_on", DISAGREE, ("has restored its model",), BOTH, raw="faulty"),
    Fault("no_hook", DISAGREE, ("different hooks", "0.up"), BOTH, raw="faulty"),
    Fault("fewer_hooks", DISAGREE, ("hooks", "1.up")),
    Fault("other_order", DISAGREE, ("hooks", "in another order, number 0 being")),
    Fault("other_groups", DISAGREE, ("hooks", "0.up", "1.up")),
    Fault("hooks_from_the_second_forward_on", DISAGREE, ("different hooks", "0.up"), raw="faulty"),
    Fault("trainable_on_one_rank", DISAGREE, ("wait for one another", "trainable module")),
    Fault("skips_a_module", DISAGREE, ("1.up", "all_reduce", ALIKE), BOTH, raw="faulty"),
    Fault("skips_one_of_two_alike", DISAGREE, ("1.up", "wait for one another", ALIKE), BOTH),
    Fault("changes_the_order", DISAGREE, ("in which order",), BOTH),
    Fault("one_more_forward", DISAGREE, ("all_reduce", ALIKE), raw="others"),
    Fault("one_waits_in_backward", DISAGREE, ("1.up", "wait for one another"), ("tp", "2x2")),
    Fault("loss_on_one_rank", DISAGREE, ("gradient of its own",), BOTH),
)
# Where a rank is late, or all do the same: nobody may be stopped.
SOUND = (
    ("all_fail_alike", "tp"),
    ("all_fail_alike", "2x2"),
    ("slow_edit", "2x2"),
    ("edit_holds_the_interpreter", "dp"),
    ("stopped_for_a_while", "2x2"),
    ("all_stopped_for_a_while", "dp"),
    ("slow_copy", "dp"),
    ("late_transfer", "dp"),
    ("fails_and_starts_again", "dp"),
    ("many_flex_models", "dp"),
)
HALVES = ("two_models_on_halves", "2x2")
# The long ones first, while the others take turns beside them.
JOBS = (*SOUND, *((f.name, layout) for f in FAULTS for layout in f.layouts), HALVES)

Found = dict[tuple[str, str], list[Rank]]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> Iterator[Found]:
    """How the ranks of every job ended that a selected test asks for."""
    wanted = {item.callspec.params["job"] for item in request.session.items if _has_job(item)}
    jobs = [job for job in JOBS if job in wanted]
    ended = run_jobs(jobs)
    yield ended
    faults = {job: ranks for job, ranks in ended.items() if job not in SOUND}
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print_table(faults, Console(width=200))


def _has_job(item: pytest.Item) -> bool:
    return "job" in getattr(getattr(item, "callspec", None), "params", {})


def _id(job: tuple[str, str]) -> str:
    return "-".join(job)


def _faulty(job: tuple[str, str]) -> int:
    return 0 if job[0] == "killed_with_the_store" else SIZES[job[1]] - 1


@pytest.mark.parametrize("job", [(f.name, way) for f in FAULTS for way in f.layouts], ids=_id)
def test_the_others_end_and_say_why(found: Found, job: tuple[str, str]) -> None:
    """Catches ranks that wait for ever, and errors that name a socket in place of a reason."""
    fault = next(f for f in FAULTS if f.name == job[0])
    ranks = found[job]
    if _slowest(fault, ranks, job) > SECONDS:  # the machine is busy: measure again, alone
        ranks = run_jobs([job])[job]
    assert _slowest(fault, ranks, job) <= SECONDS
    for number, rank in enumerate(ranks):
        _check(fault, rank, number == _faulty(job), _faulty(job))


def _slowest(fault: Fault, ranks: list[Rank], job: tuple[str, str]) -> float:
    """Seconds until all have ended; infinite for one that did not by itself."""
    left = [r for n, r in enumerate(ranks) if n != _faulty(job) or fault.code is not None]
    return max(float("inf") if r.code is None else r.ended for r in left)


def _check(fault: Fault, rank: Rank, faulty: bool, number: int) -> None:
    shown = f"{rank.kind}: {rank.message}\n{rank.log}"
    assert rank.code == (fault.code if faulty else 1), shown
    if faulty and fault.kind == FAILED:
        return  # it has its own error, or none
    if fault.raw == ("faulty" if faulty else "others") or (faulty and fault.code != 1):
        return
    assert rank.named, shown
    assert rank.kind == fault.kind, shown
    for word in (f"rank {number}", *fault.words):
        assert word in rank.message, shown


@pytest.mark.parametrize("job", SOUND, ids=_id)
def test_nobody_is_stopped_where_all_is_well(found: Found, job: tuple[str, str]) -> None:
    """Catches false alarms: a rank may be slow, busy, or fail in company."""
    for rank in found[job]:
        assert rank.code == 0, f"{rank.kind}: {rank.message}\n{rank.log}"


@pytest.mark.parametrize("job", [HALVES], ids=_id)
def test_a_fault_does_not_concern_another_model(found: Found, job: tuple[str, str]) -> None:
    assert [rank.code for rank in found[job]] == [0, 0, 1, 1]
    assert found[job][2].kind == FAILED
