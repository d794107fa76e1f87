"""Jobs whose ranks fail, each rank a process of its own, and how long the others take to end.

    python tests/distributed/failing_ranks.py                # every fault: prints the table
    python tests/distributed/failing_ranks.py edit_raises    # those whose name contains a word

This process is the launcher: it hosts the job's store, waits a bounded time, and ends what it has
started. Nothing else frees a rank: this launcher sends no signal when the first one fails.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table

JOB = Path(__file__).with_name("failing_job.py")
SIZES = {"tp": 2, "dp": 2, "2x2": 4}


@dataclass
class Rank:
    """How one rank ended.

    Attributes:
        code: exit code; None if it had to be ended.
        ended: seconds from the fault to the process's end.
        told: seconds from the fault to the error; None if there was none.
        kind: class of the error.
        named: whether it is one of flex_model's.
        message: its text.
        notes: what was added to it.
        log: what the process wrote.
    """

    code: int | None = None
    ended: float = 0.0
    told: float | None = None
    kind: str = ""
    named: bool = False
    message: str = ""
    notes: list[str] = field(default_factory=list)
    log: str = ""


class Nursery:
    """A process that has torch imported and forks ranks; see `failing_job`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(JOB)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._numbers = count()
        self._changed = threading.Condition()
        self._gone = False
        self._started: dict[int, int] = {}
        self._ended: dict[int, tuple[int, float]] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, told: dict[str, Any]) -> int:
        """Start a rank; its process id."""
        with self._changed:
            number = next(self._numbers)
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({**told, "id": number}).encode() + b"\n")
            self._changed.wait_for(lambda: number in self._started or self._gone, 60)
            assert number in self._started, "the nursery starts no rank; see its standard error"
            return self._started[number]

    def wait(self, process_ids: Iterable[int], seconds: float) -> dict[int, tuple[int, float]]:
        """Exit code and time of those that have ended by then."""
        ids = list(process_ids)
        with self._changed:
            self._changed.wait_for(lambda: all(i in self._ended for i in ids), seconds)
            return {i: self._ended[i] for i in ids if i in self._ended}

    def end(self, process_id: int) -> None:
        """End a rank that has not ended by itself, once it has written down where it stands."""
        with suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGUSR1)
            time.sleep(0.2)
            os.kill(process_id, signal.SIGKILL)
        assert process_id in self.wait([process_id], 10), f"process {process_id} does not end"

    def close(self) -> None:
        """End it, and with it every rank."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            with self._changed:
                if "started" in told:
                    self._started[told["for"]] = told["started"]
                else:
                    self._ended[told["ended"]] = (told["code"], told["time"])
                self._changed.notify_all()
        with self._changed:
            self._gone = True
            self._changed.notify_all()


def run_job(nursery: Nursery, fault: str, layout: str, limit: float) -> list[Rank]:
    """How each rank of a job with a fault ended, of those given up those too.

    Args:
        nursery: where ranks are forked.
        fault: a function of `failing_job`.
        layout: "tp", "dp" or "2x2".
        limit: seconds from the start after which what has not ended is ended.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = SIZES[layout]
    with tempfile.TemporaryDirectory(prefix="failing_ranks_") as folder:
        told = {"fault": fault, "layout": layout, "world": world, "port": store.port}
        ids = [nursery.start({**told, "rank": r, "folder": folder}) for r in range(world)]
        ended: dict[int, tuple[int, float]] = {}
        deadline = time.monotonic() + limit
        try:
            # A rank that stands still ends by nobody's will but ours: do not wait for it.
            others = ids[:-1] if fault == "stands_still" else ids
            nursery.wait(others, deadline - time.monotonic())
            ended = nursery.wait(ids, 0.0)
        finally:
            for process_id in ids:
                if process_id not in ended:
                    nursery.end(process_id)
        return [_rank(Path(folder), r, ended.get(ids[r])) for r in range(world)]


def _rank(folder: Path, number: int, ended: tuple[int, float] | None) -> Rank:
    stamp = folder / "fault"
    fault = float(stamp.read_text()) if stamp.exists() else time.time()
    rank = Rank(log=(folder / f"{number}.log").read_text(errors="replace"))
    if ended is not None:
        rank.code, rank.ended = ended[0], ended[1] - fault
    file = folder / f"{number}.json"
    if file.exists():
        told = json.loads(file.read_text())
        rank.told = told.pop("time") - fault
        for name, value in told.items():
            setattr(rank, name, value)
    return rank


def run_jobs(
    jobs: Sequence[tuple[str, str]], limit: float = 60.0, at_once: int = 6
) -> dict[tuple[str, str], list[Rank]]:
    """Several jobs, a few at a time: most of their time they wait."""
    nursery = Nursery()
    try:
        with ThreadPoolExecutor(at_once) as pool:
            ranks = list(pool.map(lambda job: run_job(nursery, *job, limit), jobs))
    finally:
        nursery.close()
    return dict(zip(jobs, ranks, strict=True))


def print_table(found: dict[tuple[str, str], list[Rank]], console: Console) -> None:
    """Seconds from each fault to each rank's error, and what one that survived it says."""
    table = Table(title="Seconds from the fault to the error, by rank (then exit code)")
    for column in ("fault", "layout", "rank 0", "rank 1", "rank 2", "rank 3"):
        table.add_column(column, no_wrap=True)
    table.add_column("what rank 0 says", max_width=70)
    for (fault, layout), ranks in found.items():
        cells = [_cell(rank) for rank in ranks] + [""] * (4 - len(ranks))
        first = next((rank for rank in ranks if rank.kind), ranks[0])
        table.add_row(fault, layout, *cells, escape(f"{first.kind}: {first.message}"[:400]))
    console.print(table)


def _cell(rank: Rank) -> str:
    seconds = "-" if rank.told is None else f"{rank.told:.1f}"
    return f"{seconds} ({'still there' if rank.code is None else rank.code})"


if __name__ == "__main__":
    from test_failing_ranks import JOBS

    word = sys.argv[1] if len(sys.argv) > 1 else ""
    wide = Console(width=190)
    print_table(run_jobs([job for job in JOBS if word in job[0]]), wide)
