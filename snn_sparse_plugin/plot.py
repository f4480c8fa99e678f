"""Pictures drawn without a display: recorded activity, a raster of spikes, and the demo's comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import InputError, MissingDependencyError
from .spikes import as_spike_train, is_sparse_input

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError as error:
    raise MissingDependencyError(
        "plots are drawn with matplotlib: pip install 'snn-sparse-plugin[plot]'"
    ) from error

if TYPE_CHECKING:
    from .activity import Activity
    from .demo import DemoResult

SPARSE, DENSE = "#0b7a75", "#b9b4ab"
LAYERS = ("#5b5750", "#0b7a75", "#d1793b")
DASHES = ("-", "--", ":")
INK = "#2b2a28"


def activity(log: Mapping[str, list[Activity]], path: str | PathLike[str] | None = None) -> Figure:
    """Spike rate and active share of each layer over its calls, one panel for each; also written to ``path``.

    Args:
        log: what :func:`~snn_sparse_plugin.record_activity` yields.
        path: a file name; its ending chooses the format.

    Raises:
        InputError: nothing was recorded.

    Example:
        >>> from snn_sparse_plugin.activity import Activity
        >>> figure = activity({"lif": [Activity(0, 0.02, 0.05, 100), Activity(1, 0.03, 0.06, 100)]})
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['spikes', 'pass a gradient']
    """
    called = {name: calls for name, calls in log.items() if calls}
    if not called:
        raise InputError("the log is empty: no neuron of the model ran sparse while it was recorded.")
    figure = _figure(9, 3.2)
    for axes, title, field in zip(
        figure.subplots(1, 2), ("spikes", "pass a gradient"), ("rate", "active"), strict=True
    ):
        _clean(axes, title)
        for k, (name, calls) in enumerate(called.items()):
            # colours repeat in a deep network, with another dash
            style = {"color": LAYERS[k % len(LAYERS)], "linestyle": DASHES[k // len(LAYERS) % len(DASHES)]}
            marker = "o" if len(calls) == 1 else None
            values = [getattr(entry, field) for entry in calls]
            axes.plot([c.call for c in calls], values, label=name or "neuron", marker=marker, **style)
        axes.set(xlabel="call", ylabel="neuron-steps")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].legend(frameon=False, fontsize=8, labelcolor=INK)
    return _saved(figure, path)


def raster(spikes: Any, sample: int = 0, path: str | PathLike[str] | None = None) -> Figure:
    """Every spike of one sample a tick, neurons over steps; also written to ``path``.

    Args:
        spikes: (T, B, N...), dense, SpikeTrain, or a sparse tensor that says what T and B are.
        sample: which of the B samples.
        path: a file name; its ending chooses the format.

    Raises:
        InputError: another shape or type, or no such sample.

    Example:
        >>> figure = raster(torch.eye(3).unsqueeze(1))
        >>> figure.axes[0].get_title(loc="left")
        'sample 0: 3 spikes'
    """
    dense = isinstance(spikes, Tensor) and not is_sparse_input(spikes)
    found: Any = spikes if dense else as_spike_train(spikes)
    if len(found.shape) < 3:
        raise InputError(f"raster takes spikes (T, B, N...), got {tuple(found.shape)}.")
    (T, B), N = found.shape[:2], found.shape[2:].numel()
    if not 0 <= sample < B:
        raise InputError(f"raster: there is no sample {sample} in a batch of {B}.")
    if dense:
        times, neurons = found[:, sample].detach().flatten(1).nonzero(as_tuple=True)
    else:
        ends = found.indptr[sample * T : (sample + 1) * T + 1].long()
        times = torch.arange(T, device=ends.device).repeat_interleave(ends.diff())
        neurons = found.indices[ends[0] : ends[-1]]
    figure = _figure(7, 3.6)
    axes = figure.subplots()
    _clean(axes, f"sample {sample}: {len(times)} spikes")
    axes.scatter(times.cpu(), neurons.cpu(), s=9, marker="|", linewidths=1.1, color=SPARSE)
    axes.set(xlim=(-1, T), ylim=(-1, N), xlabel="step", ylabel="neuron")
    return _saved(figure, path)


def ttfs_spike_times(
    times: Mapping[str, Tensor], window: int | None = None, path: str | PathLike[str] | None = None
) -> Figure:
    """Histogram of spike times, one panel a layer, with the share of silent neurons; also written to ``path``.

    Args:
        times: spike times (B, …) uint8 by layer, as ``net.run(x, record=True).times``; 255 is silent.
        window: steps of the axis; by default up to the latest spike.
        path: a file name; its ending chooses the format.

    Raises:
        InputError: nothing to draw, or not uint8.

    Example:
        >>> figure = ttfs_spike_times({"input": torch.tensor([[0, 3, 255]], dtype=torch.uint8)})
        >>> figure.axes[0].get_title(loc="left")
        'input: 33 % silent'
    """
    if not times:
        raise InputError("there are no spike times to draw: run the network with record=True.")
    figure = _figure(2.6 * min(4, len(times)), 2.4 * -(-len(times) // 4))
    panels = figure.subplots(-(-len(times) // 4), min(4, len(times)), squeeze=False).flatten()
    for axes, (name, found) in zip(panels, times.items(), strict=False):
        if found.dtype != torch.uint8:
            raise InputError(f"{name}: spike times are uint8, got {found.dtype}.")
        counts = torch.bincount(found.detach().flatten().long().cpu(), minlength=256)
        share = counts[255].item() / max(1, found.numel())
        fired = counts[:255].nonzero()
        steps = window or (int(fired.max()) + 1 if len(fired) else 1)
        _clean(axes, f"{name}: {100 * share:.0f} % silent")
        axes.bar(range(steps), counts[:steps].numpy() / max(1, len(found)), width=0.9, color=SPARSE)
        axes.set(xlabel="step", ylabel="spikes per sample", xlim=(-0.6, steps - 0.4))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[len(times) :]:
        axes.set_visible(False)
    return _saved(figure, path)


def ttfs_preactivations(model: Any, x: Tensor, path: str | PathLike[str] | None = None) -> Figure:
    """Distribution of each TTFS layer's input, with x_m, the smallest value that fires, and x_M, the largest told.

    Args:
        model: holds TTFS layers; run once on ``x``, in eval mode.
        x: a batch the model takes.
        path: a file name; its ending chooses the format.

    Raises:
        InputError: no TTFS layer ran.
    """
    from .layers.ttfs import TTFS, TTFSEncoder

    seen: dict[str, tuple[TTFS, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: TTFS, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = module, inputs[0].detach().float().flatten().cpu()

        return hook

    layers = [
        (n, m) for n, m in model.named_modules() if isinstance(m, TTFS) and not isinstance(m, TTFSEncoder)
    ]
    handles = [m.register_forward_pre_hook(keep(n)) for n, m in layers]
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    if not seen:
        raise InputError("no TTFS layer of the model ran: there are no pre-activations to draw.")
    figure = _figure(2.8 * min(4, len(seen)), 2.4 * -(-len(seen) // 4))
    panels = figure.subplots(-(-len(seen) // 4), min(4, len(seen)), squeeze=False).flatten()
    for axes, (name, (layer, values)) in zip(panels, seen.items(), strict=False):
        low, high = layer.x_m, layer.x_M
        pruned = (values < low).float().mean().item()
        _clean(axes, f"{name}: {100 * pruned:.0f} % pruned")
        axes.hist(values.numpy(), bins=80, density=True, color=DENSE)
        for value, label in ((low, "x_m"), (high, "x_M")):
            axes.axvline(value, color=SPARSE, linewidth=1)
            axes.annotate(label, (value, 0.97), xycoords=("data", "axes fraction"), fontsize=8, color=INK)
        axes.set(xlabel="pre-activation", ylabel="density")
    for axes in panels[len(seen) :]:
        axes.set_visible(False)
    return _saved(figure, path)


def ttfs_kernels(
    history: Mapping[str, Sequence[tuple[float, float]]], path: str | PathLike[str] | None = None
) -> Figure:
    """Kernel parameters over training, tau and t_d in two panels, a line for each layer; also written to ``path``.

    Args:
        history: (tau, t_d) of every epoch by layer.
        path: a file name; its ending chooses the format.

    Raises:
        InputError: nothing was recorded.

    Example:
        >>> figure = ttfs_kernels({"spike1": [(10.0, 0.0), (9.5, 0.2)]})
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['tau', 't_d']
    """
    if not any(history.values()):
        raise InputError("the history is empty: append (tau, t_d) of every layer after each epoch.")
    figure = _figure(9, 3.2)
    for axes, title, part in zip(figure.subplots(1, 2), ("tau", "t_d"), (0, 1), strict=True):
        _clean(axes, title)
        for k, (name, values) in enumerate(history.items()):
            style = {"color": LAYERS[k % len(LAYERS)], "linestyle": DASHES[k // len(LAYERS) % len(DASHES)]}
            axes.plot([v[part] for v in values], label=name, **style)
        axes.set(xlabel="epoch", ylabel="steps")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].legend(frameon=False, fontsize=8, labelcolor=INK)
    return _saved(figure, path)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: Figure, path: str | PathLike[str] | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def demo_figure(result: DemoResult) -> Figure:
    """Four panels: one sample's spikes, activity over training, accuracy, and time and memory of a step."""
    figure = Figure(
        figsize=(11, 6.6),
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=0.03, hspace=0.06),
    )
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 6, height_ratios=(1.25, 1))
    _raster(figure.add_subplot(grid[0, :4]), result)
    _accuracy(figure.add_subplot(grid[0, 4:]), result)
    _activity(figure.add_subplot(grid[1, :2]), result)
    sparse, dense = result.sparse, result.dense
    _bars(figure.add_subplot(grid[1, 2:4]), "training step", sparse.step_ms, dense.step_ms, "ms")
    scale = 2.0**20
    _bars(
        figure.add_subplot(grid[1, 4:]),
        "saved for backward",
        sparse.saved_bytes / scale,
        dense.saved_bytes / scale,
        "MiB",
    )
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


def _clean(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#8b867e")
    axes.tick_params(colors="#5b5750", labelsize=9)


def _raster(axes: Axes, result: DemoResult) -> None:
    """Every spike a tick; layers stacked from the input at the bottom."""
    _clean(axes, f"one test image, a “{result.label}”, through the sparse network")
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
    _clean(axes, "test accuracy")
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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _activity(axes: Axes, result: DemoResult) -> None:
    _clean(axes, "activity over training")
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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _bars(axes: Axes, title: str, sparse: float, dense: float, unit: str) -> None:
    _clean(axes, title)
    values = [dense, sparse]
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
