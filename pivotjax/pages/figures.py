"""Figures made without pyplot: no window, no global state."""

import io
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
SERIES = ("#2f6db3", "#d9822b", "#3a9a6b", "#8a5fb0", "#c44e52", "#3aa6b0", "#8c6d31", "#b0578d", "#5f7d95", "#7f7f7f")
GOOD_TO_BAD = LinearSegmentedColormap.from_list(
    "good to bad", ["#1d5f8a", "#5fa3c4", "#d3e6ee", "#f7e9d7", "#e9b583", "#c8693b"]
)
AROUND_ZERO = LinearSegmentedColormap.from_list("around zero", ["#c8693b", "#f7e9d7", "#ffffff", "#d3e6ee", "#1d5f8a"])
WIDTH = 8.0  # inches; at _DPI twice what a page shows, so that text stays crisp
_DPI = 170


class Plot(NamedTuple):
    figure: Figure
    alt: str  # what a reader who cannot see it should know


def png(figure: Figure) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def number(value: float | None) -> float:
    """A number of a report; what JSON could not hold (null) is not a number."""
    return float("nan") if value is None else float(value)


def colour_of(i: int) -> str:
    """The colour of the i-th series."""
    return SERIES[i % len(SERIES)]


def blank(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def row_of_axes(count: int, height: float, width: float = WIDTH, **options) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes side by side; `options` are those of `Figure.subplots`."""
    figure = blank(height, width)
    return figure, list(figure.subplots(1, count, squeeze=False, **options)[0])


def grid(axis: Axes, which: str = "both") -> None:
    """A quiet grid and no box."""
    axis.grid(True, axis=which, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=FAINT, labelsize=8, labelcolor=INK)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(GRID)


def legend_above(figure: Figure, axis: Axes, count: int) -> None:
    """One legend for the whole figure, made of an axis' series."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(count, 4), frameon=False, fontsize=8)


def cosine_map(axis: Axes, cosines: list[list[float | None]], names: list[str]) -> None:
    """A square table of cosines, coloured around 0."""
    values = np.array([[number(x) for x in row] for row in cosines])
    axis.imshow(values, cmap=AROUND_ZERO, vmin=-1, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = f"{value:.2f}" if len(names) <= 10 else ""
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if value > 0.7 else INK)
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.tick_params(length=0)
