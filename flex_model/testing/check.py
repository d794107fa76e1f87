"""The grid's checks on a user's own model: one process against the ranks of this very job.

The first rank has the truth made in a process of its own. All ranks then do the same work under a
FlexModel, one kind of hook after the other, and tell each other after each how it went: a rank that
raised alone has left the others behind, and what they would measure next would mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist

from flex_model.errors import ConfigurationError
from flex_model.testing.case import Case, Data, Site
from flex_model.testing.compare import Measurement
from flex_model.testing.ranks import RankFailure, run_ranks
from flex_model.testing.runs import RUNS
from flex_model.testing.sharded import bare_on_a_rank, measured
from flex_model.testing.step import Outcome
from flex_model.testing.survey import Survey
from flex_model.testing.truth import bare_on_one_process, on_one_process
from flex_model.testing.user_model import survey_of, user_case
from flex_model.testing.verdict import State, Verdict, judged

__all__ = ["BuildError", "Check", "Request"]

T = TypeVar("T")

# A truth may fail or take its time on the first rank; the others wait as long, and a little more.
_SLACK_SECONDS = 30.0


@dataclass(frozen=True)
class Request:
    """What is to be checked.

    Attributes:
        source: the model's directory or factory.
        tp: tensor-parallel ranks.
        dp: data-parallel ranks.
        hooks: module names; none for all.
        batch: sequences of each data-parallel rank.
        sequence: tokens of each.
        vocabulary: ids are drawn below this; None to read it off the model.
        tolerance: the largest relative error that passes.
        timeout: seconds that any one wait may take.
    """

    source: str
    tp: int
    dp: int
    hooks: tuple[str, ...]
    batch: int
    sequence: int
    vocabulary: int | None
    tolerance: float
    timeout: float


@dataclass(frozen=True)
class _Attempt:
    """How one kind of hook went on one rank: ``raised`` is what no rule of the library names."""

    measured: tuple[Measurement, ...] = ()
    refused: str = ""
    raised: str = ""

    @property
    def kind(self) -> tuple[bool, str]:
        """What ranks that are in step have alike: the class of what was raised, if anything."""
        return bool(self.measured), (self.refused or self.raised).partition(":")[0]


class BuildError(RuntimeError):
    """This rank's part of the model cannot be built, or another's."""


class Check:
    """A check under way on this rank; every rank of the job makes one and does the same with it.

    Args:
        request: the same on every rank.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        # Beside the model's groups, for those may be left in the midst of a collective.
        limit = timedelta(seconds=request.timeout + _SLACK_SECONDS)
        self._group = dist.new_group(backend="gloo", timeout=limit)
        self._broken = False

    def together(self, own: T) -> list[T]:
        """What every rank has, in rank order."""
        found: list[Any] = [None] * self._group.size()
        dist.all_gather_object(found, own, group=self._group)
        return found

    def survey(self) -> tuple[Survey, Case]:
        """See what the whole model offers, and build this rank's part of the other.

        Raises:
            ConfigurationError: on every rank, if one process cannot build the whole model.
            BuildError: on a rank that cannot build its part. It must leave, so that others that
                wait for it come here too.
        """
        ask = self.request
        batch = ask.batch * ask.dp
        found = self._from_first(survey_of, ask.source, batch, ask.sequence, ask.vocabulary)
        if isinstance(found, str):
            raise ConfigurationError(f"The whole model, on one process: {found}")
        data = Data(found.vocabulary, ask.batch, ask.sequence)
        case = user_case(ask.source, ask.tp, ask.dp, found, data, ask.tolerance)
        try:
            with case.sharded():
                self.together(None)
        except Exception as error:
            told = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
            raise BuildError(f"The sharded model: {told}") from error
        return found, case

    def bare(self, case: Case) -> Verdict:
        """The models themselves, with no hook: what every hook's error begins with.

        Raises:
            ConfigurationError: on every rank, if one process cannot take a step.
        """
        truth = self._from_first(bare_on_one_process, case)
        if isinstance(truth, str):
            raise ConfigurationError(f"A step of the whole model, on one process: {truth}")
        wrong: list[str] = []
        attempts = self._tried(partial(_bare_measured, case, truth), wrong)
        return judged("(no hook)", _numbers(attempts), [], wrong)

    def verdicts(self, case: Case, sites: Sequence[Site]) -> Iterator[Verdict]:
        """Every kind of hook at each of the sites."""
        for site in sites:
            if self._broken:
                note = "the ranks were left out of step by what went wrong before"
                yield Verdict(str(site), State.UNCHECKED, notes=(note,))
                continue
            truth = self._from_first(on_one_process, case, site)
            if isinstance(truth, str):
                note = f"one process fails with hooks here too: {truth}"
                yield Verdict(str(site), State.DEGRADED, notes=(note,))
            else:
                yield self._at(case, site, truth)

    def _at(self, case: Case, site: Site, truth: Mapping[str, Outcome]) -> Verdict:
        attempts: list[_Attempt] = []
        refusals: dict[str, tuple[str, list[str]]] = {}
        wrong: list[str] = []
        with case.sharded() as model:
            for run in RUNS:
                if not run.fits(site) or self._broken:
                    continue
                work = partial(measured, case, model, site, run, truth=truth[run.column])
                found = self._tried(partial(work, hinted=False), wrong)
                if (why := found[0].refused) and not self._broken:
                    found = self._tried(partial(work, hinted=True), wrong)
                    out = "made with expected_shape only" if found[0].measured else "refused"
                    _, kinds = refusals.setdefault(f"{out}: {why.partition(':')[0]}", (why, []))
                    kinds.append(run.column)
                attempts += found
        degraded = [
            f"{', '.join(kinds)}: {way.partition(':')[0]}: {why}"
            for way, (why, kinds) in refusals.items()
        ]
        return judged(str(site), _numbers(attempts), [*_not_offered(site), *degraded], wrong)

    def _tried(self, work: Callable[[], Sequence[Measurement]], wrong: list[str]) -> list[_Attempt]:
        """One kind of work on every rank; adds to ``wrong`` what no rule of the library names.

        Ranks that went different ways are out of step from then on.
        """
        found = self.together(_attempt(work))
        in_step = len({attempt.kind for attempt in found}) == 1
        self._broken = self._broken or not in_step
        told = (a.raised if in_step else a.raised or a.refused for a in found)
        wrong += dict.fromkeys(text for text in told if text)
        return found

    def _from_first(self, body: Callable[..., T], *args: Any) -> T | str:
        """What a body returns in a process of its own, started by the first rank; or its failure.

        Sent on to every rank.
        """
        told: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                told = run_ranks(body, 1, *args, timeout=self.request.timeout)
            except RankFailure as failure:
                first = next(iter(failure.failures.values()))
                told = [f"{first.kind}: {first.message}"]
        dist.broadcast_object_list(told, src=0, group=self._group)
        return told[0]


def _attempt(work: Callable[[], Sequence[Measurement]]) -> _Attempt:
    try:
        found = tuple(work())
    except Exception as error:  # noqa: BLE001 - the other ranks are to hear of it
        return _Attempt(raised=f"{type(error).__name__}: {error} (rank {dist.get_rank()})")
    refusals = [m.note for m in found if m.quantity == "raised"]
    if not refusals:
        return _Attempt(measured=found)
    if refusals[0].startswith("RankFailedError"):
        return _Attempt(raised=refusals[0])
    return _Attempt(refused=refusals[0])


def _bare_measured(case: Case, truth: Outcome) -> list[Measurement]:
    return [
        Measurement("no hook", "", False, name, error, case.tolerance(name))
        for name, error in bare_on_a_rank(case, truth).items()
    ]


def _numbers(attempts: Sequence[_Attempt]) -> list[Measurement]:
    return [measurement for attempt in attempts for measurement in attempt.measured]


def _not_offered(site: Site) -> list[str]:
    """The kinds of hooks that torch itself does not offer at a site."""
    missing = [run.column for run in RUNS if not run.fits(site)]
    return [f"torch offers no {', no '.join(missing)} here"] if missing else []
