"""Runs the job in processes of its own and shows how far it is."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.progress import Progress

__all__ = ["run"]

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def run(ranks: int, model: Path, output: Path, progress: Progress) -> None:
    """Runs the job on so many ranks; what it prints on its way out is shown only if it fails."""
    launcher = () if ranks == 1 else (*TORCHRUN, str(ranks))
    command = (sys.executable, *launcher, "-m", "demo_job.job", str(model), str(output))
    title = "one process" if ranks == 1 else f"{ranks} ranks"
    bar = progress.add_task(f"{title}: starting", total=None)
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # too small a model to share out
        ) as job:
            for line in job.stdout or ():
                count, what = line.split(maxsplit=1)
                done, total = map(int, count.split("/"))
                progress.update(
                    bar, completed=done, total=total, description=f"{title}: {what.strip()}"
                )
        if job.returncode:
            errors.seek(0)
            raise SystemExit(f"{errors.read()}\nThe job on {title} failed: {' '.join(command)}")
    progress.update(bar, description=f"{title}: done")
