"""Generations of a run's state on disk, of which one is always whole.

    step_000120/rank_0.safetensors ...    each rank's own sums, as they lie there
    step_000120/manifest.json             written last: with it the generation is complete

A rank writes its file under a temporary name; when all ranks have, the files are renamed; when all
ranks have, the first one writes the manifest in the same way; and only then the generations before
are removed. Whenever a process is killed, what has a manifest is whole, and what has none counts
for nothing. The folder is one that all ranks see.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flex_model.errors import ImportanceError
from flex_model.importance import files
from flex_model.importance.run.fingerprint import PER_RANK, difference
from flex_model.importance.run.peers import Peers

__all__ = ["Checkpoints", "Progress"]

Nested = Mapping[str, Mapping[str, Any]]

_MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d+)")
# Beside the hooks' keys, which are names of modules.
_RUN = "(run)"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        batches: done on every rank.
        digest: of this rank's batches.
        state: what each hook has found on this rank.
    """

    batches: int
    digest: int
    state: Nested


class Checkpoints:
    """The generations of one run.

    Args:
        folder: made when the first is written.
        peers: the ranks.
        facts: what this rank's state is of.
    """

    def __init__(self, folder: str | Path, peers: Peers, facts: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._peers = peers
        self._facts = facts

    def save(self, progress: Progress) -> None:
        """Write a generation, and remove those before it. Collective.

        Raises:
            ImportanceError: a rank could not write; the generation before is still there.
        """
        step, first = self.folder / f"step_{progress.batches:06d}", self._peers.first
        run = {"facts": self._facts, "batches": progress.batches, "digest": progress.digest}
        own = {**progress.state, _RUN: run}
        files.replaced({self._file(step): lambda path: files.write(path, own)}, self._agreed)
        common = {name: fact for name, fact in self._facts.items() if name not in PER_RANK}
        last = {step / _MANIFEST: lambda path: files.write_json(path, common)}
        files.replaced(last if first else {}, self._agreed)
        if first:
            self._remove_all_but(step)

    def newest(self) -> Progress | None:
        """Read the newest complete generation; None if there is none. Collective.

        Raises:
            ImportanceError: it is of another run, a file is damaged or missing, or ranks see
                different ones. Nothing was changed.
        """
        what = f"looking into {self.folder}"
        rows = self._peers.meet(what, lambda: [max(self._complete(), default=-1)], 1)
        seen = {rank: row[0] for rank, row in rows.items()}
        if len(set(seen.values())) > 1:
            raise ImportanceError(
                f"Ranks see different checkpoints in {self.folder}, by the batch of the newest: "
                f"{seen}. Give a folder that all ranks share."
            )
        batches = max(seen.values())
        if batches < 0:
            return None
        step, found = self._complete()[batches], []
        what = f"The checkpoint {step} cannot be resumed"
        self._peers.agreed(what, lambda: found.append(self._read(step)))
        return found[0]

    def _read(self, step: Path) -> Progress:
        try:
            self._check(json.loads((step / _MANIFEST).read_text()))
            state = files.read(self._file(step))
            run = state.pop(_RUN)
        except (OSError, ValueError, KeyError) as error:
            raise ImportanceError(
                f"{type(error).__name__}: {error}. Nothing was changed; to score anew, remove it."
            ) from error
        self._check(run["facts"])
        return Progress(run["batches"], run["digest"], state)

    def _check(self, saved: Mapping[str, Any]) -> None:
        found = difference(saved, self._facts)
        if found is not None:
            raise ImportanceError(f"{found}. Give another folder, or what it was made with.")

    def _agreed(self, what: str, step: Callable[[], None]) -> None:
        self._peers.agreed(f"{what} a checkpoint into {self.folder}", step)

    def _complete(self) -> dict[int, Path]:
        """The complete generations, by their batches."""
        found = {path: _STEP.fullmatch(path.name) for path in self.folder.glob("step_*")}
        return {
            int(name[1]): path
            for path, name in found.items()
            if name and (path / _MANIFEST).exists()
        }

    def _file(self, step: Path) -> Path:
        return step / f"rank_{self._peers.number}.safetensors"

    def _remove_all_but(self, step: Path) -> None:
        """A generation that is half removed must not look whole: its manifest goes first."""
        for other in self.folder.glob("step_*"):
            if other != step and _STEP.fullmatch(other.name):
                (other / _MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(other, ignore_errors=True)
