"""Scores as a picture: per family of layers their sorted scores, and a heat map over the layers."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure, SubFigure

from flex_model.importance.results.summary import Family, Row

__all__ = ["draw", "png"]

_COLORS = "viridis"
# Without the brightest, which a line on white would not show.
_LINES = ListedColormap(colormaps[_COLORS](np.linspace(0.0, 0.9, 256)))
_COLUMNS = 400
_LEAST = 1e-3  # of a layer's largest score: below, the heat map is dark
_LOG_FROM = 30.0  # how far the largest score is above the median, for a scale of decades
_WIDTH, _HEIGHT, _DPI = 12.0, 3.2, 120
_MOST_ROWS = 16


def draw(families: Sequence[Family]) -> Figure:
    """One strip for each family."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT * max(1, len(families))), layout="constrained")
    strips = figure.subfigures(max(1, len(families)), 1, squeeze=False)[:, 0]
    for strip, family in zip(strips, families, strict=False):
        _strip(strip, family)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _strip(strip: SubFigure, family: Family) -> None:
    strip.suptitle(f"{family.name or '(the model)'}   {family.kind}", fontsize="medium")
    if all(row.scores.numel() == 1 for row in family.members):
        _bars(strip.subplots(), family)
    elif any(row.ranks for row in family.members):
        _rank_map(strip, strip.subplots(), family)
    else:
        left, right = strip.subplots(1, 2, width_ratios=(2, 3))
        _lines(strip, left, family)
        _heat_map(strip, right, family)


def _bars(axes: Axes, family: Family) -> None:
    """One score for each layer."""
    axes.bar(range(len(family.members)), [float(row.scores[0]) for row in family.members])
    _layers_along(axes.xaxis, family)
    axes.set(xlabel="layer", ylabel="score")


def _lines(strip: SubFigure, axes: Axes, family: Family) -> None:
    """Each layer's scores from the largest on."""
    norm = Normalize(0, max(1, len(family.members) - 1))
    for number, row in enumerate(family.members):
        values = _descending(row)
        places = 100 * (np.arange(len(values)) + 0.5) / len(values)
        marker = "o" if len(values) < 20 else ""
        color = _LINES(norm(number))
        axes.plot(places, values, color=color, linewidth=1.2, marker=marker, markersize=3)
    if all(_spreads(row) for row in family.members):
        axes.set_yscale("log")
    axes.set(xlabel=_along(family), ylabel="score", xlim=(0, 100))
    axes.grid(alpha=0.3)
    if len(family.members) > 1:
        bar = strip.colorbar(ScalarMappable(norm, _LINES), ax=axes, label="layer")
        _layers_along(bar.ax.yaxis, family)


def _heat_map(strip: SubFigure, axes: Axes, family: Family) -> None:
    """The same, each layer as a row, of its largest score."""
    lines = [_resampled(_descending(row)) for row in family.members]
    shown = np.stack([np.clip(line / max(line[0], 1e-300), _LEAST, 1.0) for line in lines])
    least = min(0.5, float(shown.min()))
    image = axes.imshow(
        shown, aspect="auto", interpolation="nearest", cmap=_COLORS,
        norm=LogNorm(least, 1.0), extent=(0, 100, len(lines) - 0.5, -0.5),
    )  # fmt: skip
    _layers_along(axes.yaxis, family)
    axes.set(xlabel=_along(family), ylabel="layer")
    ticks = np.geomspace(least, 1.0, 4)
    bar = strip.colorbar(image, ax=axes, label="of the layer's largest")
    bar.set_ticks(ticks.tolist(), labels=[f"{tick:.2g}" for tick in ticks], minor=False)
    bar.minorticks_off()


def _rank_map(strip: SubFigure, axes: Axes, family: Family) -> None:
    """Ranks, sorted, are the same in every layer: they are shown in the channels' own order."""
    longest = max(row.scores.numel() for row in family.members)
    shown = np.full((len(family.members), longest), np.nan)
    for number, row in enumerate(family.members):
        shown[number, : row.scores.numel()] = row.scores.numpy() / max(1, row.scores.numel() - 1)
    image = axes.imshow(
        shown, aspect="auto", interpolation="nearest", cmap=_COLORS, vmin=0.0, vmax=1.0
    )
    _layers_along(axes.yaxis, family)
    axes.set(xlabel="channel", ylabel="layer")
    strip.colorbar(image, ax=axes, label="rank (0 goes first)")


def _layers_along(axis: Axis, family: Family) -> None:
    step = -(-len(family.members) // _MOST_ROWS)
    places = range(0, len(family.members), step)
    axis.set_ticks(list(places), labels=[family.members[n].layer for n in places])


def _along(family: Family) -> str:
    return f"{'heads' if family.kind.endswith('heads') else 'channels'}, by score (%)"


def _descending(row: Row) -> np.ndarray:
    return np.sort(row.scores.numpy())[::-1]


def _spreads(row: Row) -> bool:
    """Whether the scores of most channels would lie on the axis without a scale of decades."""
    values = _descending(row)
    return bool(values[-1] > 0 and values[0] > _LOG_FROM * np.median(values))


def _resampled(values: np.ndarray) -> np.ndarray:
    """As many columns for each layer."""
    at = (np.arange(_COLUMNS) + 0.5) / _COLUMNS * len(values)
    return values[at.astype(int)]
