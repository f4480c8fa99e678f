"""The pictures of a study, drawn from the results on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..files import reading, write_atomic
from ..files.unpack import arrays
from ..plot.style import DENSE, INK, LAYERS, SPARSE, clean, new_figure, whole_numbers
from .study import Study


def draw(study: Study, results: dict[str, Any]) -> dict[str, list[str]]:
    """Draw what the finished parts give; returns the file names, by part."""
    drawn: dict[str, list[str]] = {}
    for part, figures in FIGURES.items():
        if part not in results:
            continue
        for name, make in figures.items():
            with reading(study.path(part), "a part's results", "Delete it."):
                figure = make(study, results[part])
            if figure is not None:
                write_atomic(study.out / f"{name}.png", partial(figure.savefig, format="png", dpi=150))
                drawn.setdefault(part, []).append(f"{name}.png")
    return drawn


def _training(study: Study, trials: list[dict[str, Any]]) -> Any:
    """Active fraction by update, loss by update and test accuracy by epoch; thin lines are single seeds."""
    figure = new_figure(11, 3.3)
    active, loss, accuracy = figure.subplots(1, 3)
    sparse = [t for t in trials if t["sparse"]]
    clean(active, "active neuron-steps")
    for k in range(len(sparse[0]["active_mean"])):
        values = 100 * np.array([[u[k] for u in t["active_by_update"]] for t in sparse])
        colour = LAYERS[(k + 1) % len(LAYERS)]
        active.plot(_smooth(values.mean(0)), color=colour, label=f"hidden layer {k + 1}")
    active.set(xlabel="update", ylabel="%")
    _from_zero(active)
    active.legend(frameon=False, fontsize=8, labelcolor=INK)
    clean(loss, "training loss")
    clean(accuracy, "test accuracy")
    for mode, name, colour, style in ((False, "dense", DENSE, "--"), (True, "sparse", SPARSE, "-")):
        chosen = [t for t in trials if t["sparse"] is mode]
        losses = np.array([t["loss_by_update"] for t in chosen])
        loss.plot(_smooth(losses.mean(0)), style, color=colour, label=name)
        percent = 100 * np.array([t["history"]["test_accuracy"] for t in chosen])
        epochs = np.arange(1, percent.shape[1] + 1)
        for one in percent:
            accuracy.plot(epochs, one, style, color=colour, linewidth=0.6, alpha=0.6)
        label = f"{name}  {percent[:, -1].mean():.1f} %"
        marker = "o" if len(epochs) == 1 else None  # a line of one point does not show
        accuracy.plot(epochs, percent.mean(0), style, color=colour, marker=marker, label=label)
    loss.set_xlabel("update")
    _from_zero(loss)
    accuracy.set(xlabel="epoch", ylabel="%")
    for axes in (active, loss, accuracy):
        whole_numbers(axes)
    for axes in (loss, accuracy):
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, reverse=True)
    return figure


def _from_zero(axes: Any) -> None:
    """Zero at the bottom, and room above the highest line: the limits found for a nearly flat one have none."""
    axes.set_ylim(0, 1.05 * max(float(np.max(line.get_ydata())) for line in axes.lines) or 1)


def _smooth(values: Any, points: int = 400) -> Any:
    """Running means, so that thousands of noisy updates make a line."""
    width = max(1, len(values) // points)
    return np.convolve(values, np.ones(width) / width, mode="valid")


def _hidden(study: Study, trials: list[dict[str, Any]]) -> Any:
    figure = new_figure(7.5, 3.1)
    accuracy, active = figure.subplots(1, 2)
    clean(accuracy, f"test accuracy after {trials[0]['epochs']} epochs")
    for mode, name, colour in ((False, "dense", DENSE), (True, "sparse", SPARSE)):
        chosen = [t for t in trials if t["sparse"] is mode]
        sizes = [t["hidden"] for t in chosen]
        accuracy.plot(sizes, [100 * t["test_accuracy"] for t in chosen], "o-", color=colour, label=name)
    accuracy.set(xlabel="N", ylabel="%")
    accuracy.legend(frameon=False, fontsize=8, labelcolor=INK, reverse=True)
    clean(active, "active neuron-steps")
    for k in range(len(chosen[0]["active_mean"])):
        values = [100 * t["active_mean"][k] for t in chosen]
        active.plot(sizes, values, "o-", color=LAYERS[(k + 1) % len(LAYERS)], label=f"hidden layer {k + 1}")
    active.set(xlabel="N", ylabel="%", ylim=(0, None))
    active.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _threshold(study: Study, rows: list[dict[str, Any]]) -> Any:
    dense, *trials = rows
    figure = new_figure(10.5, 3.1)
    accuracy, active, error = figure.subplots(1, 3)
    windows = [t["threshold"] for t in trials]
    clean(accuracy, f"test accuracy after {dense['epochs']} epochs")
    accuracy.plot(windows, [100 * t["test_accuracy"] for t in trials], "o-", color=SPARSE, label="sparse")
    accuracy.axhline(100 * dense["test_accuracy"], color=DENSE, linestyle="--", label="dense")
    accuracy.legend(frameon=False, fontsize=8, labelcolor=INK)
    clean(active, "active neuron-steps")
    clean(error, "relative error of the gradient")
    for k in range(len(trials[0]["active_mean"])):
        colour = LAYERS[(k + 1) % len(LAYERS)]
        values = [100 * t["active_mean"][k] for t in trials]
        active.plot(windows, values, "o-", color=colour, label=f"hidden layer {k + 1}")
        errors = [t["gradients"][k]["relative_error"] for t in trials]
        error.plot(windows, errors, "o-", color=colour, label=trials[0]["gradients"][k]["weights"])
    for axes, unit in ((accuracy, "%"), (active, "%"), (error, "")):
        axes.set(xlabel="B_th", ylabel=unit)
        _window_axis(axes, windows)
    active.legend(frameon=False, fontsize=8, labelcolor=INK)
    error.legend(frameon=False, fontsize=8, labelcolor=INK)
    error.set_ylim(0, None)
    return figure


def _window_axis(axes: Any, windows: list[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(windows, [f"{w:g}" for w in windows], minor=False)
    axes.minorticks_off()


def _depth(study: Study, found: dict[str, Any]) -> Any:
    trials, rows = found["trials"], found["gradients"]
    figure = new_figure(10.5, 3.1)
    loss, active, error = figure.subplots(1, 3)
    clean(loss, f"training loss, {trials[0]['layers']} layers of {trials[0]['hidden']}")
    for t, colour, style in zip(trials, (SPARSE, DENSE), ("-", "--"), strict=True):
        name = "sparse" if t["sparse"] else "dense"
        loss.plot(_smooth(np.array(t["loss_by_update"])), style, color=colour, label=name)
    loss.set_xlabel("update")
    _from_zero(loss)
    loss.legend(frameon=False, fontsize=8, labelcolor=INK)
    clean(active, "active neuron-steps")
    layers = range(1, len(trials[0]["active_mean"]) + 1)
    active.bar(layers, [100 * a for a in trials[0]["active_mean"]], color=SPARSE)
    active.set(xlabel="hidden layer", ylabel="%")
    clean(error, "relative error of the gradient")
    error.bar(range(1, len(rows) + 1), [row["relative_error"] for row in rows], color=SPARSE)
    error.set(xlabel="weight matrix, from the input")
    return figure


def _gradients(study: Study, found: list[dict[str, Any]]) -> Any:
    """Both gradients of every hidden weight matrix after training, on one scale of colours."""
    path = study.out / "gradients.npz"
    if not path.is_file():
        return None
    epochs = found[-1]["epochs"]
    count = min(2, len(found[-1]["rows"]) - 1)
    figure = new_figure(9, 3.1 * count)
    with reading(path, "the gradients of this study", "Delete it, and the part's results."):
        names = {f"{name}_{k}_{epochs}" for name in ("dense", "sparse") for k in range(count)}
        matrices = arrays(path, names.__contains__)
        if set(matrices) != names or any(m.ndim != 2 or m.dtype.kind != "f" for m in matrices.values()):
            raise ValueError(f"it does not hold the matrices {', '.join(sorted(names))}")
    for k, pair in enumerate(figure.subplots(count, 2, squeeze=False)):
        dense = matrices[f"dense_{k}_{epochs}"]
        limit = float(np.quantile(np.abs(dense), 0.995)) or 1.0
        row = found[-1]["rows"][k]
        for axes, name in zip(pair, ("dense", "sparse"), strict=True):
            title = f"{row['weights']}, {name}"
            if name == "sparse":
                title += f": relative error {row['relative_error']:.3f}"
            clean(axes, title)
            grad = matrices[f"{name}_{k}_{epochs}"]
            shown = axes.imshow(
                grad, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
            )
            axes.set(xlabel="from", ylabel="to")
        figure.colorbar(shown, ax=list(pair), shrink=0.8)
    return figure


def _speed(study: Study, rows: list[dict[str, Any]]) -> Any:
    """Speed-up and saved memory of the second layer, over N and over B_th."""
    sweeps = {
        name: [r for r in rows if r["sweep"] == name]
        for name in ("hidden", "threshold")
        if any(r["sweep"] == name for r in rows)
    }
    if not sweeps:
        return None
    figure = new_figure(9.5, 3.1 * len(sweeps))
    for (sweep, chosen), pair in zip(
        sweeps.items(), figure.subplots(len(sweeps), 2, squeeze=False), strict=True
    ):
        at = [r[sweep] for r in chosen]
        faster, memory = pair
        clean(faster, "one layer, times as fast as snnTorch's loop")
        for phase, colour in (("backward", SPARSE), ("forward", LAYERS[2])):
            key = f"{phase}_ms"
            ratios = [r["snntorch"][key]["median"] / r["sparse"][key]["median"] for r in chosen]
            faster.plot(at, ratios, "o-", color=colour, label=phase)
        faster.legend(frameon=False, fontsize=8, labelcolor=INK)
        clean(memory, "memory saved for backward, against the loop")
        less = [100 * (1 - r["sparse"]["saved_bytes"] / r["snntorch"]["saved_bytes"]) for r in chosen]
        memory.plot(at, less, "o-", color=SPARSE)
        memory.set(ylabel="% less", ylim=(0, 103))
        faster.set_ylim(0, None)
        for axes in pair:
            axes.set_xlabel("N" if sweep == "hidden" else "B_th")
            if sweep == "threshold":
                _window_axis(axes, at)
    return figure


FIGURES: dict[str, dict[str, Callable[[Study, Any], Any]]] = {
    "train": {"training": _training},
    "speed": {"speed": _speed},
    "hidden": {"hidden": _hidden},
    "threshold": {"threshold": _threshold},
    "depth": {"depth": _depth},
    "gradients": {"gradients": _gradients},
}
