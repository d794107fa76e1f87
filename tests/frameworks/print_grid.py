"""Print the parity grid: each framework's hooks on N ranks against one process.

    scripts/parity                      all rows
    scripts/parity fairscale ddp        the rows whose name contains one of these
    scripts/parity --list               the rows there are
    scripts/parity --write FILE         all rows, and the table into a page, between its two marks

Ends with 1 if a cell lies above its tolerance: 1e-6, or 1e-5 where ranks add up a sum in another
order than one process does (see Case.tolerance).
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flex_model.testing.compare import Measurement
from flex_model.testing.grid import measure_row
from flex_model.testing.table import grid_table, markdown_table
from frameworks.rows import ROW_NAMES, row

BEGIN, END = "<!-- the grid begins -->", "<!-- the grid ends -->"
_TABLE_WIDTH = 190  # a narrower terminal wraps its lines, which reads better than cut numbers


def main() -> int:
    """Measure, print the grid, then what does not pass."""
    parser = argparse.ArgumentParser("scripts/parity", description="Print the parity grid.")
    parser.add_argument("rows", nargs="*", help="rows whose name contains one of these; else all")
    parser.add_argument("--write", type=Path, help="the page whose table is to be replaced")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    arguments = parser.parse_args()
    names = [
        name
        for name in ROW_NAMES
        if not arguments.rows or any(part in name for part in arguments.rows)
    ]
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)
    if arguments.list or not names:
        console.print("\n".join(ROW_NAMES))
        return 0 if arguments.list else 2
    measured = _measure(names, console)
    console.print(grid_table(measured))
    if arguments.write is not None:
        replace_table(arguments.write, markdown_table(measured))
    wrong = [(name, m) for name, row in measured.items() for m in row if not m.passes]
    for name, measurement in wrong:
        console.print(f"{name}: {measurement}", style="red", markup=False)
    return 1 if wrong else 0


def replace_table(page: Path, table: str) -> None:
    """Put a table in the place of the one between the marks in a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def _measure(names: list[str], console: Console) -> dict[str, list[Measurement]]:
    cases = [row(name) for name in names]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    measured = {}
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        sites = progress.add_task("", total=sum(len(case.sites) for case in cases))
        for case in cases:
            progress.update(sites, description=case.name)
            measured[case.name] = measure_row(case, lambda site: progress.advance(sites))
    return measured


if __name__ == "__main__":
    sys.exit(main())
