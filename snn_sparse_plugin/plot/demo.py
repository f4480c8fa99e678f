"""The demo's comparison of sparse and dense training."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.demo_result import DemoResult
from .style import (
    BYTES,
    DENSE,
    INK,
    LAYERS,
    MILLISECONDS,
    SPARSE,
    Axes,
    Figure,
    clean,
    new_figure,
    sensible,
    whole_numbers,
)


def demo_figure(result: DemoResult) -> Figure:
    """Four panels: one sample's spikes, activity over training, accuracy, and time and memory of a step."""
    figure = new_figure(11, 6.6, wspace=0.03, hspace=0.06)
    grid = figure.add_gridspec(2, 6, height_ratios=(1.25, 1))
    _raster(figure.add_subplot(grid[0, :4]), result)
    _accuracy(figure.add_subplot(grid[0, 4:]), result)
    _activity(figure.add_subplot(grid[1, :2]), result)
    sparse, dense = result.sparse, result.dense
    _bars(figure.add_subplot(grid[1, 2:4]), "training step", sparse.step_ms, dense.step_ms, MILLISECONDS)
    _bars(figure.add_subplot(grid[1, 4:]), "saved for backward", sparse.saved_bytes, dense.saved_bytes, BYTES)
    options = result.options
    figure.suptitle(
        f"{options.library} on {options.data}: T = {options.steps}, B = {options.batch}, "
        f"two hidden layers of {options.hidden}",
        x=0.012,
        ha="left",
        color=INK,
        fontsize=13,
        fontweight="bold",
    )
    return figure


def _raster(axes: Axes, result: DemoResult) -> None:
    """Every spike a tick; layers stacked from the input at the bottom."""
    clean(axes, f"one test image, a “{result.label}”, through the sparse network")
    base, labels = 0.0, ("input", *(f"hidden {k}" for k in range(1, len(result.raster))))
    heights = [max(60.0, float(n)) for *_, n in result.raster]
    ticks = []
    for (times, neurons, n), height, colour in zip(result.raster, heights, LAYERS, strict=False):
        rows = [base + (k + 0.5) * height / n for k in neurons]
        axes.scatter(times, rows, s=9, marker="|", linewidths=1.1, color=colour)
        ticks.append(base + height / 2)
        base += height
        axes.axhline(base + 8, color="#e4e0d8", linewidth=0.8, zorder=0)
        base += 16
    names = [
        f"{label}\n{len(times)} spikes" for label, (times, *_) in zip(labels, result.raster, strict=True)
    ]
    axes.set_yticks(ticks, names)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(-1, result.options.steps), ylim=(-8, base - 8), xlabel="step")


def _accuracy(axes: Axes, result: DemoResult) -> None:
    clean(axes, "test accuracy")
    epochs = range(1, len(result.sparse.accuracy) + 1)
    for training, colour, label, style in (
        (result.dense, "#8b867e", "dense", "--"),
        (result.sparse, SPARSE, "sparse", "-"),
    ):
        percent = [100 * a for a in training.accuracy]
        axes.plot(
            epochs,
            percent,
            style,
            color=colour,
            marker="o",
            markersize=4,
            label=f"{label}  {percent[-1]:.1f} %",
        )
    axes.legend(frameon=False, loc="lower right", fontsize=9, labelcolor=INK, reverse=True)
    axes.set(xlabel="epoch", ylabel="%", ylim=(None, 101))
    whole_numbers(axes)


def _activity(axes: Axes, result: DemoResult) -> None:
    clean(axes, "activity over training")
    spikes, active = result.activity.spikes, result.activity.active
    for k in range(len(spikes[0])):
        colour = LAYERS[(k + 1) % len(LAYERS)]
        axes.plot([100 * row[k] for row in active], color=colour, label=f"hidden {k + 1}, near threshold")
        axes.plot(
            [100 * row[k] for row in spikes], color=colour, linestyle=":", label=f"hidden {k + 1}, spikes"
        )
    # room for the legend above the highest line
    axes.set_ylim(0, 1.8 * max(100 * value for row in (*spikes, *active) for value in row) or 1)
    axes.legend(
        frameon=False, fontsize=8, loc="upper left", labelcolor=INK, handlelength=1.6, labelspacing=0.25
    )
    axes.set(xlabel="epoch", ylabel="% of neuron-steps")
    whole_numbers(axes)


def _bars(axes: Axes, title: str, sparse: float, dense: float, units: Sequence[tuple[float, str]]) -> None:
    clean(axes, title)
    scale, unit = sensible(max(sparse, dense), units)
    values = [dense / scale, sparse / scale]
    bars = axes.barh(["dense", "sparse"], values, color=[DENSE, SPARSE], height=0.55)
    axes.bar_label(bars, labels=[f"{v:.3g} {unit}" for v in values], padding=4, color=INK, fontsize=9.5)
    axes.set_xlim(0, 1.3 * max(values))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    ratio = dense / sparse if sparse else float("inf")
    axes.set_title(
        f"{ratio:.1f}× less" if ratio >= 1 else f"{1 / ratio:.1f}× more", loc="right", fontsize=10.5
    )
