"""Recorded activity of layers, and a raster of spikes."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.spikes import as_spike_train, is_sparse_input
from .style import (
    DASHES,
    INK,
    LAYERS,
    SPARSE,
    Figure,
    PercentFormatter,
    clean,
    new_figure,
    saved,
    whole_numbers,
)

if TYPE_CHECKING:
    from ..activity import Activity


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
    figure = new_figure(9, 3.2)
    for axes, title, field in zip(
        figure.subplots(1, 2), ("spikes", "pass a gradient"), ("rate", "active"), strict=True
    ):
        clean(axes, title)
        for k, (name, calls) in enumerate(called.items()):
            # colours repeat in a deep network, with another dash
            style = {"color": LAYERS[k % len(LAYERS)], "linestyle": DASHES[k // len(LAYERS) % len(DASHES)]}
            marker = "o" if len(calls) == 1 else None  # a line of one point is not seen
            values = [getattr(entry, field) for entry in calls]
            axes.plot([c.call for c in calls], values, label=name or "neuron", marker=marker, **style)
        axes.set(xlabel="call", ylabel="neuron-steps")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        whole_numbers(axes)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return saved(figure, path)


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
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    clean(axes, f"sample {sample}: {len(times)} spikes")
    axes.scatter(times.cpu(), neurons.cpu(), s=9, marker="|", linewidths=1.1, color=SPARSE)
    axes.set(xlim=(-1, T), ylim=(-1, N), xlabel="step", ylabel="neuron")
    whole_numbers(axes, y=True)
    return saved(figure, path)
