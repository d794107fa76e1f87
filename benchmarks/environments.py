"""Libraries to compare with, each in an environment of its own, made once and kept.

An environment holds that library alone: torch and everything else are those of the environment that
is active, so that nothing but the library differs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

__all__ = ["CACHE", "borrowing_python"]

CACHE = Path(__file__).parents[1] / ".cache"


def borrowing_python(name: str, wanted: Sequence[str]) -> Path:
    """The interpreter that imports some packages first, installing them where they are missing.

    Args:
        name: of the environment's folder.
        wanted: requirements; what they depend on is borrowed.
    """
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = CACHE / f"{name}-python{here}"
    python = folder / "bin" / "python"
    finished = folder / "finished"
    if not finished.exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, symlinks=True)
        _install(python, wanted)
        finished.touch()
    _borrow(folder)
    return python


def _install(python: Path, wanted: Sequence[str]) -> None:
    pip = (sys.executable, "-m", "pip", "--quiet", "--python", str(python))
    command = (*pip, "install", "--no-deps", *wanted)
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(f"{done.stderr}\nCould not install {', '.join(wanted)} to compare with.")


def _borrow(folder: Path) -> None:
    """Let the environment import, behind what it has itself, what the active one has."""
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(packages, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
