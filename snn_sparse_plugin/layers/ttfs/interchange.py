"""Single spikes in the forms of other libraries: times, dense (T, B, N…) tensors, :class:`SpikeTrain`.

snnTorch and Norse keep spikes dense with time first, so one pair of functions serves both: :func:`dense_spikes` and
:func:`first_spike_times`.
"""

from __future__ import annotations

import itertools
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import InputError, MissingDependencyError, UnsupportedError
from ...core.spikes import SpikeTrain, as_spike_train, is_sparse_input
from ...data.coding import single_spikes
from ...files import reading, write_atomic
from ...files.unpack import arrays
from ...ops.ttfs import MAX_WINDOW, SILENT
from ...ops.ttfs import reference as coding

if TYPE_CHECKING:
    from .network import TTFSNetwork
    from .neuron import TTFS


def _described(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _check_times(times: Any, window: int) -> None:
    if not isinstance(times, Tensor) or times.dtype != torch.uint8 or times.dim() < 2:
        raise InputError(f"spike times are uint8 (B, N…), got {_described(times)}.")
    _check_window(window)
    if bool(((times >= window) & (times != SILENT)).any()):
        late = int(times[times != SILENT].max())
        raise InputError(f"a spike at step {late} lies outside a window of {window} steps.")


def _check_window(window: int) -> None:
    if not 1 <= window <= MAX_WINDOW:
        raise InputError(f"a window has 1 to {MAX_WINDOW} steps, got {window}.")


def dense_spikes(times: Tensor, window: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Spike times (B, N…) as zeros and ones (window, B, N…): the tensor that snnTorch's losses and Norse's layers take.

    Raises:
        InputError: not uint8, or a time outside the window.

    Example:
        >>> dense_spikes(torch.tensor([[1, 255]], dtype=torch.uint8), 3).flatten(1).tolist()
        [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    """
    _check_times(times, window)
    steps = torch.arange(window, device=times.device).view(-1, *(1 for _ in times.shape))
    return (times == steps).to(dtype)


def first_spike_times(spikes: Any) -> Tensor:
    """The first spike of every neuron of a train (T, B, N…), dense or sparse, as times (B, N…) uint8, 255 for none.

    Reads the output of ``snntorch.spikegen.latency`` and of Norse's encoders. Later spikes are left out, as by
    Norse's ``SpikeLatencyEncoder``.

    Raises:
        InputError: more than 255 steps, fewer than three dimensions, or values other than 0 and 1.

    Example:
        >>> first_spike_times(torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]]])).tolist()
        [[1, 255]]
    """
    if isinstance(spikes, SpikeTrain) or is_sparse_input(spikes):
        spikes = as_spike_train(spikes).to_dense()
    if not isinstance(spikes, Tensor) or spikes.dim() < 3 or not 1 <= spikes.shape[0] <= MAX_WINDOW:
        raise InputError(
            f"first_spike_times takes spikes (T, B, N…) of at most {MAX_WINDOW} steps, got {_described(spikes)}."
        )
    spikes = spikes.detach()
    if not bool(((spikes == 0) | (spikes == 1)).all()):
        raise InputError("first_spike_times takes zeros and ones; these spikes are graded, or not spikes.")
    fired = spikes != 0
    first = fired.to(torch.uint8).argmax(0).to(torch.uint8)
    return first.masked_fill(~fired.any(0), SILENT)


def to_spike_train(times: Tensor, window: int) -> SpikeTrain:
    """Spike times (B, N…) as events (window, B, N…); nothing dense is made.

    Example:
        >>> to_spike_train(torch.tensor([[1, 255, 0]], dtype=torch.uint8), 3)
        SpikeTrain(T=3, B=1, N=(3,), events=2, density=22.2%, dtype=torch.float32, device=cpu)
    """
    _check_times(times, window)
    return single_spikes(times, window)  # what is silent, 255, lies behind every window


def times_from_norse(decoded: Tensor, window: int, dt: float | None = None) -> Tensor:
    """The output (1, B, N…) of Norse's ``SpikesToTimesDecoder`` as spike times (B, N…) uint8.

    Args:
        decoded: step indices, or with ``dt`` times in seconds. What is infinite or outside the window is silent.
        window: number of steps, at most 255.

    Raises:
        InputError: not a tensor (1, B, N…), or a window that one byte cannot count.

    Example:
        >>> times_from_norse(torch.tensor([[[2.0, torch.inf]]]), 4).tolist()
        [[2, 255]]
    """
    if not isinstance(decoded, Tensor) or decoded.dim() < 3 or len(decoded) != 1:
        raise InputError(f"SpikesToTimesDecoder gives times (1, B, N…), got {_described(decoded)}.")
    _check_window(window)
    steps = decoded[0].detach() if dt is None else (decoded[0].detach() / dt).round()
    fired = steps.isfinite() & (steps >= 0) & (steps < window)
    return torch.where(fired, steps, SILENT).to(torch.uint8)


def spike_view(x: Tensor, layer: TTFS) -> Tensor:
    """The spikes (window, B, N…) of a :class:`TTFS` layer as an output, with a gradient, for losses on first spikes.

    The gradient at a neuron's spike passes to its pre-activation unchanged, a silent neuron's at the last step, so
    that ``snntorch.functional.ce_temporal_loss``, which counts a silent neuron as a spike there, can wake it. The
    kernel gets none.

    Args:
        x: pre-activations (B, N…): what the layer would be called with.
        layer: the layer.

    Example:
        >>> from snn_sparse_plugin.layers.ttfs import TTFS
        >>> spike_view(torch.tensor([[0.9, 0.1]]), TTFS(window=4)).flatten(1).tolist()
        [[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        raise InputError(f"spike_view takes floating pre-activations (B, N…), got {_described(x)}.")
    return _SpikeView.apply(x, layer.table(x.dtype))[0]


class _SpikeView(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        times = coding.encode(x, table)
        return dense_spikes(times, table.shape[1], x.dtype), times

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.window = inputs[1].shape[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (times,) = ctx.saved_tensors
        step = times.long().clamp(max=ctx.window - 1)
        return grads[0].gather(0, step.unsqueeze(0)).squeeze(0), None


# --- files ---


def save_spike_times(net: TTFSNetwork, x: Tensor, path: str | PathLike[str], **options: Any) -> None:
    """Simulate a batch and write its spike times to an ``.npz`` file.

    For each layer ``times/<layer>`` (B, …) uint8, 255 for silent, and ``values/<layer>``, what a spike of each step
    is worth; also ``output`` (B, classes). Options are those of :meth:`TTFSNetwork.run`.

    Raises:
        FileError: the file cannot be written; an older one is as it was.
    """
    run = net.run(x, record=True, **options)
    tables = {"input": net.encoder} | {s.name: s.table for s in net.stages if s.table is not None}
    tensors = {"output": run.output}
    for name, times in run.times.items():
        tensors |= {f"times/{name}": times, f"values/{name}": tables[name][1]}
    found = {k: v.cpu().numpy() for k, v in tensors.items()}
    # as numpy: .npz is added where it is missing
    place = path if str(path).endswith(".npz") else f"{path}.npz"
    write_atomic(place, lambda file: np.savez_compressed(file, **found))  # type: ignore[arg-type]


def load_spike_times(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Spike times by layer, (B, …) uint8, from a file of :func:`save_spike_times`.

    Raises:
        InputError: no such file, or another content.
    """
    with reading(path, "a file of spike times"):
        stored = arrays(path)
    found = {k.removeprefix("times/"): v for k, v in stored.items() if k.startswith("times/")}
    if not found:
        raise InputError(f"{path} holds no spike times (arrays named times/…).")
    if len({v.shape[:1] for v in found.values()}) > 1:
        raise InputError(f"{path}: its layers are of batches of different sizes.")
    layers: dict[str, Any] = {}
    for name, times in found.items():
        values = stored.get(f"values/{name}")
        window = MAX_WINDOW if values is None else values.size
        # copied, since what is read from a file is read-only
        layers[name] = torch.from_numpy(times.copy()) if times.dtype == np.uint8 else None
        try:
            _check_times(layers[name], window)
        except InputError as error:
            what = f"times/{name} is {times.dtype} {times.shape}: {error}"
            raise InputError(f"{path} is not a file of spike times, or it is damaged: {what}") from error
    return layers


def decode_times(net: TTFSNetwork, layer: str, times: Tensor) -> Tensor:
    """What the spikes of a layer (``"input"`` or its name) are worth, of the shape of ``times``.

    Raises:
        InputError: there is no such layer, or times that lie outside its window.
    """
    tables = {"input": net.encoder} | {s.name: s.table for s in net.stages if s.table is not None}
    if layer not in tables:
        raise InputError(f"there is no spiking layer {layer!r}; there are {', '.join(tables)}.")
    _check_times(times, tables[layer].shape[1])
    return coding.decode(times, tables[layer])


def to_nir(net: TTFSNetwork, *, neurons: str | None = None) -> Any:
    """The network as a ``nir.NIRGraph``, as far as NIR can express it.

    NIR has linear layers, convolutions, average pooling and flattening, but no neuron with a falling threshold that
    fires once, and no max pooling. So this raises unless ``neurons="threshold"`` is asked for: then each layer of
    neurons is a ``nir.Threshold`` at the smallest value that fires, which tells whether a neuron fires, not when, and
    its node's ``metadata`` holds thresholds and values of every step, for readers that know this coding.

    Raises:
        UnsupportedError: what NIR cannot express, named.
        MissingDependencyError: nir is not installed.
    """
    try:
        import nir
    except ImportError as error:
        raise MissingDependencyError("NIR graphs need nir: pip install nir") from error
    pooled = [s.name for s in net.stages if any(p.kind == "max" for p in s.before) or s.after]
    if pooled:
        raise UnsupportedError(
            f"NIR has no max pooling, as before or behind {', '.join(pooled)}: use AvgPool2d."
        )
    if neurons != "threshold":
        raise UnsupportedError(
            "NIR has no neuron with a falling threshold that fires once, so spike times cannot be expressed. "
            'neurons="threshold" exports connections and pruning thresholds, with the kernel as metadata.'
        )
    nodes: dict[str, Any] = {"input": nir.Input({"input": np.array(net.input_shape)})}
    nodes["encoder"] = _nir_threshold(nir, net.encoder, net.input_shape)
    for stage in net.stages:
        name = stage.name.replace(".", "_")
        weight = stage.weight.detach().cpu().numpy()
        bias = (
            np.zeros(weight.shape[0], weight.dtype)
            if stage.bias is None
            else stage.bias.detach().cpu().numpy()
        )
        arriving = stage.in_shape
        if stage.average is not None:
            (kh, kw), (c, h, w) = stage.average.kernel, arriving
            nodes[f"{name}_pool"] = nir.AvgPool2d(np.array([kh, kw]), np.array([kh, kw]), np.array([0, 0]))
            arriving = (c, h // kh, w // kw)
        if stage.conv:
            nodes[name] = nir.Conv2d(
                arriving[1:], weight, stage.stride, stage.padding, stage.dilation, stage.groups, bias
            )
        else:
            if len(arriving) > 1:
                nodes[f"{name}_flatten"] = nir.Flatten({"input": np.array(arriving)}, 0, -1)
            nodes[name] = nir.Affine(weight, bias)
        if stage.table is not None:
            nodes[f"{name}_neurons"] = _nir_threshold(nir, stage.table, stage.out_shape)
    nodes["output"] = nir.Output({"output": np.array(net.stages[-1].out_shape)})
    names = list(nodes)
    return nir.NIRGraph(nodes, list(itertools.pairwise(names)))


def _nir_threshold(nir: Any, table: Tensor, shape: tuple[int, ...]) -> Any:
    rows = table.detach().cpu().numpy()
    node = nir.Threshold(np.full(shape, rows[0, -1]))
    node.metadata = {"coding": "time-to-first-spike", "thresholds": rows[0], "values": rows[1]}
    return node
