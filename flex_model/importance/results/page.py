"""Scores as one HTML page that stands alone: it loads nothing, and holds the picture itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from flex_model.importance.results.summary import Row
from flex_model.importance.results.table import HEAD, cells

__all__ = ["page"]

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }}
h1 {{ font-size: 1.3rem; }}
img {{ max-width: 100%; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }}
th {{ position: sticky; top: 0; background: #fff; }}
th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left; }}
pre {{ background: #f5f5f5; padding: .8rem; overflow-x: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
<img alt="Sorted scores per layer, and heat maps over layers" src="data:image/png;base64,{png}">
<h2>Scores</h2>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
<h2>The run</h2>
<pre>{run}</pre>
</body>
</html>
"""


def page(title: str, rows: Sequence[Row], png: bytes, run: Mapping[str, Any]) -> str:
    """The page.

    Args:
        title: shown on top.
        rows: of the table.
        png: the picture.
        run: what the run was started with; shown as JSON.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in HEAD)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in cells(row)) for row in rows)
    return _PAGE.format(
        title=escape(title),
        png=base64.b64encode(png).decode(),
        head=head,
        body="\n".join(f"<tr>{line}</tr>" for line in lines),
        run=escape(json.dumps(run, indent=2)),
    )
