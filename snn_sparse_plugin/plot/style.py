"""What all pictures share: figures that need no display, their colours and axes."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from os import PathLike
from pathlib import Path

from ..core.errors import MissingDependencyError
from ..files import write_atomic

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError as error:
    raise MissingDependencyError("plots are drawn with matplotlib: pip install matplotlib") from error

__all__ = [
    "BYTES",
    "DASHES",
    "DENSE",
    "INK",
    "LAYERS",
    "MILLISECONDS",
    "SPARSE",
    "Axes",
    "Figure",
    "PercentFormatter",
    "clean",
    "new_figure",
    "panels",
    "saved",
    "sensible",
    "whole_numbers",
]

SPARSE, DENSE = "#0b7a75", "#b9b4ab"
LAYERS = ("#5b5750", "#0b7a75", "#d1793b")
DASHES = ("-", "--", ":")
INK = "#2b2a28"


def new_figure(width: float, height: float, wspace: float = 0.02, hspace: float = 0.02) -> Figure:
    spaces = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=wspace, hspace=hspace)
    figure = Figure(figsize=(width, height), layout=spaces)
    FigureCanvasAgg(figure)
    return figure


def panels(names: Collection[str], width: float, height: float) -> tuple[Figure, list[Axes]]:
    """One panel for each name, four in a row."""
    n = len(names)
    rows, columns = -(-n // 4), min(4, n)
    figure = new_figure(width * columns, height * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for spare in axes[n:]:
        spare.set_visible(False)
    return figure, axes[:n]


def saved(figure: Figure, path: str | PathLike[str] | None) -> Figure:
    if path is not None:
        kind = Path(path).suffix[1:] or "png"
        place = path if Path(path).suffix else f"{os.fspath(path)}.png"  # as matplotlib names it
        write_atomic(place, lambda file: figure.savefig(file, format=kind, dpi=150))
    return figure


def clean(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#8b867e")
    axes.tick_params(colors="#5b5750", labelsize=9)


def whole_numbers(axes: Axes, y: bool = False) -> None:
    """Ticks of the x axis at whole steps or epochs; with ``y`` those of the other too, at whole neurons."""
    for axis in (axes.xaxis, axes.yaxis)[: 2 if y else 1]:
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def sensible(value: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit of which there is at least one: its size and its name.

    Example:
        >>> sensible(2500.0, MILLISECONDS)
        (1000.0, 's')
    """
    return next((unit for unit in reversed(units) if value >= unit[0]), units[0])


MILLISECONDS = ((1e-3, "µs"), (1.0, "ms"), (1e3, "s"))
BYTES = ((1.0, "B"), (2.0**10, "KiB"), (2.0**20, "MiB"), (2.0**30, "GiB"))
