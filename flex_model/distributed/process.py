"""What one process can tell of another without its help: where it runs, and whether it still does.

A sign of life comes from a thread that needs the interpreter, which a C extension may hold for as
long as it likes; a process that is looked at from outside cannot be mistaken so.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

__all__ = ["State", "space", "state_of"]

State = Literal["lives", "stopped", "ended"]


def space() -> str:
    """A word that processes share exactly if they can look at each other; empty if none can.

    Host names will not do: containers, and whole clusters, may have the same.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def state_of(process_id: int) -> State:
    """How a process in this one's space is. One that a debugger has stopped counts as living."""
    try:
        os.kill(process_id, 0)
        told = Path(f"/proc/{process_id}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return "ended"
    except OSError:
        return "lives"
    letter = told.rpartition(")")[2].split()[0]
    return "ended" if letter in "ZX" else "stopped" if letter == "T" else "lives"
