"""The demo as `scripts/demo` runs it: the model, the job both ways, the comparison."""

from __future__ import annotations

import json
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from byte_llama import CACHE, byte_llama
from demo_job.launch import run
from demo_job.report import report

OUTPUT = CACHE / "demo"


def main() -> int:
    """Runs the demo; the exit status says whether the ranks gave what one process gives."""
    console = Console()
    model = byte_llama()
    loss = json.loads((model / "training.json").read_text())["validation_loss"]
    console.print(f"Byte-level Llama: validation loss {loss:.3f} nats/byte")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        run(1, model, OUTPUT / "one_process", progress)
        run(2, model, OUTPUT / "two_ranks", progress)
    equal = report(console, OUTPUT / "one_process", OUTPUT / "two_ranks")
    console.print(f"Model: {model}\nActivations, texts and losses of both jobs: {OUTPUT}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
