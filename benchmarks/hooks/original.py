"""flex-model 0.1.0 in an environment of its own, made once and kept.

Its package has this library's name. The environment holds nothing else: torch and transformers are
those of the environment that is active, so that nothing but the library differs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

__all__ = ["VERSION", "original_python"]

VERSION = "0.1.0"


def original_python(cache: Path) -> Path:
    """The interpreter that imports flex-model 0.1.0, installing it where it is missing."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache / f"flex-model-{VERSION}-python{here}"
    python = folder / "bin" / "python"
    finished = folder / "finished"
    if not finished.exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, symlinks=True)
        _install(python)
        finished.touch()
    _borrow(folder)
    return python


def _install(python: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--quiet", "--python", str(python))
    wanted = f"flex-model=={VERSION}"
    command = (*pip, "install", "--no-deps", wanted)
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise SystemExit(f"{done.stderr}\nCould not install {wanted} to compare with.")


def _borrow(folder: Path) -> None:
    """Let the environment import, behind what it has itself, what the active one has."""
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(packages, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
