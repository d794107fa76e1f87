"""`scripts/bench importance`: one run in which both libraries' hooks are called in turn."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from environments import borrowing_python

MODELOPT = "0.47.0"
ROOT = Path(__file__).parents[2]
# What importing it needs beyond what is there for this library.
WANTED = (
    f"nvidia-modelopt=={MODELOPT}",
    "ninja",
    "nvidia-ml-py",
    "pulp<4",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "scipy",
)


def main() -> None:
    """Runs `importance.measure` where both libraries can be imported."""
    python = borrowing_python(f"modelopt-{MODELOPT}", WANTED)
    paths = (ROOT, ROOT / "benchmarks", ROOT / "tests")
    environment = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        (str(python), "-W", "ignore", "-m", "importance.measure"),
        env=os.environ | environment,
        check=False,
    )
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
