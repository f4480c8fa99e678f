"""Time-to-first-spike networks: spike times, pre-activations, kernels over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..ops.ttfs import MAX_WINDOW, SILENT
from .style import DASHES, DENSE, INK, LAYERS, SPARSE, Figure, clean, new_figure, panels, saved, whole_numbers

if TYPE_CHECKING:
    from ..layers.ttfs import TTFS


def ttfs_spike_times(
    times: Mapping[str, Tensor], window: int | None = None, path: str | PathLike[str] | None = None
) -> Figure:
    """Histogram of spike times, one panel a layer, with the share of silent neurons; also written to ``path``.

    Args:
        times: spike times (B, …) uint8 by layer, as ``net.run(x, record=True).times``; 255 is silent.
        window: steps of the axis, at most 255; by default up to the latest spike.
        path: a file name; its ending chooses the format.

    Raises:
        InputError: nothing to draw, not uint8, or a window that one byte cannot count.

    Example:
        >>> figure = ttfs_spike_times({"input": torch.tensor([[0, 3, 255]], dtype=torch.uint8)})
        >>> figure.axes[0].get_title(loc="left")
        'input: 33 % silent'
    """
    if not times:
        raise InputError("there are no spike times to draw: run the network with record=True.")
    if window is not None and not 1 <= window <= MAX_WINDOW:
        raise InputError(f"a window has 1 to {MAX_WINDOW} steps, got {window}.")
    figure, axes_of = panels(times, 2.6, 2.4)
    for axes, (name, found) in zip(axes_of, times.items(), strict=True):
        if found.dtype != torch.uint8:
            raise InputError(f"{name}: spike times are uint8, got {found.dtype}.")
        counts = torch.bincount(found.detach().flatten().long().cpu(), minlength=SILENT + 1)
        share = counts[SILENT].item() / max(1, found.numel())
        fired = counts[:SILENT].nonzero()
        steps = window or (int(fired.max()) + 1 if len(fired) else 1)
        clean(axes, f"{name}: {100 * share:.0f} % silent")
        axes.bar(range(steps), counts[:steps].numpy() / max(1, len(found)), width=0.9, color=SPARSE)
        axes.set(xlabel="step", ylabel="spikes per sample", xlim=(-0.6, steps - 0.4))
        whole_numbers(axes)
    return saved(figure, path)


def ttfs_preactivations(model: Any, x: Tensor, path: str | PathLike[str] | None = None) -> Figure:
    """Distribution of each TTFS layer's input, with x_m, the smallest value that fires, and x_M, the largest told.

    Args:
        model: holds TTFS layers; run once on ``x``, in eval mode.
        x: a batch the model takes.
        path: a file name; its ending chooses the format.

    Raises:
        InputError: no TTFS layer ran, or one got values that are not finite.
    """
    from ..layers.ttfs import TTFS, TTFSEncoder

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
    for name, (_, values) in seen.items():
        if not bool(values.isfinite().all()):
            raise InputError(f"{name}: the pre-activations have NaN or infinite values.")
    figure, axes_of = panels(seen, 2.8, 2.4)
    for axes, (name, (layer, values)) in zip(axes_of, seen.items(), strict=True):
        low, high = layer.x_m, layer.x_M
        pruned = (values < low).float().mean().item()
        clean(axes, f"{name}: {100 * pruned:.0f} % pruned")
        axes.hist(values.numpy(), bins=80, density=True, color=DENSE)
        for value, label in ((low, "x_m"), (high, "x_M")):
            axes.axvline(value, color=SPARSE, linewidth=1)
            axes.annotate(label, (value, 0.97), xycoords=("data", "axes fraction"), fontsize=8, color=INK)
        axes.set(xlabel="pre-activation", ylabel="density")
    return saved(figure, path)


def ttfs_kernels(
    history: Mapping[str, Sequence[tuple[float, float]]] | Sequence[Mapping[str, tuple[float, float]]],
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Kernel parameters over training, tau and t_d in two panels, a line for each layer; also written to ``path``.

    Args:
        history: one :func:`~snn_sparse_plugin.layers.ttfs.kernel_parameters` an epoch, or (tau, t_d) of every epoch
            by layer.
        path: a file name; its ending chooses the format.

    Raises:
        InputError: nothing was recorded, or epochs name different layers.

    Example:
        >>> figure = ttfs_kernels([{"spike1": (10.0, 0.0)}, {"spike1": (9.5, 0.2)}])
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['tau', 't_d']
    """
    if not isinstance(history, Mapping):
        if any(set(epoch) != set(history[0]) for epoch in history):
            raise InputError("the epochs of the history name different layers: they are of one model.")
        history = {name: [epoch[name] for epoch in history] for name in (history[0] if history else ())}
    if not any(history.values()):
        raise InputError("the history is empty: append kernel_parameters(model) after each epoch.")
    figure = new_figure(9, 3.2)
    for axes, title, part in zip(figure.subplots(1, 2), ("tau", "t_d"), (0, 1), strict=True):
        clean(axes, title)
        for k, (name, values) in enumerate(history.items()):
            style = {"color": LAYERS[k % len(LAYERS)], "linestyle": DASHES[k // len(LAYERS) % len(DASHES)]}
            axes.plot([v[part] for v in values], label=name, **style)
        axes.set(xlabel="epoch", ylabel="steps")
        whole_numbers(axes)
    figure.axes[0].legend(frameon=False, fontsize=8, labelcolor=INK)
    return saved(figure, path)
