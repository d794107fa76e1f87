"""Every kind of hook on every framework's hook points equals one process."""

from pathlib import Path

import pytest

from flex_model.testing.case import HARD_SITES
from flex_model.testing.grid import measure_row
from flex_model.testing.runs import COLUMNS
from frameworks.print_grid import BEGIN, END
from frameworks.rows import ROW_NAMES, row

SUPPORT = Path(__file__).parents[1] / "docs" / "support.md"


def test_the_page_shows_the_rows_that_there_are():
    """Catches a table in the documentation that was typed, or measured before a row was added."""
    table = SUPPORT.read_text().partition(BEGIN)[2].partition(END)[0]
    lines = [line.strip("| ").split(" | ") for line in table.strip().splitlines()]
    assert [line[0] for line in lines[2:]] == list(ROW_NAMES)
    assert [cell.strip() for cell in lines[0][1:]] == [*COLUMNS, *HARD_SITES]
    assert "**" not in table, "a cell that does not pass"


@pytest.mark.parametrize("name", ROW_NAMES)
def test_row_equals_one_process(name):
    """Without a hint at every hook point, with one at the first: scripts/parity has them all."""
    case = row(name)
    measured = measure_row(case, hinted=lambda site: site == case.sites[0])
    wrong = [measurement for measurement in measured if not measurement.passes]
    assert not wrong, "\n".join(["above the tolerance:", *map(str, wrong)])
