"""The event-by-event simulator of a stage: prepares memory orders for the compiled kernels, and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...core.backend import calls
from ...core.config import current_config
from ...core.errors import InputError
from ...ops.ttfs import SILENT, ttfs
from .checks import check_arriving, check_stage
from .stages import Stage, on_the_clock


class StageRun(NamedTuple):
    """One stage's neurons: membranes (B, …), spike times (B, …) uint8 or None, spikes and operations (B,)."""

    u: Tensor
    times: Tensor | None
    spikes: Tensor
    synops: Tensor


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Rows, columns, channels; a flat layer is one position, and two dimensions are one channel, as for torch."""
    if len(shape) == 2:
        return shape[0], shape[1], 1
    return (shape[1], shape[2], shape[0]) if len(shape) == 3 else (1, 1, math.prod(shape))


def prepare(stage: Stage, arriving: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...], tuple[int, ...], bool]:
    """Weights as rows, membranes at the start, sizes and taps in the kernels' order, and whether the layer is dense.

    ``arriving`` are the spike times (B, …) behind a max pooling.
    """
    H, W, C = _image(tuple(arriving.shape[1:]))
    OH, OW, OC = _image(stage.out_shape)
    ph, pw = stage.average.kernel if stage.average else (1, 1)
    weight = stage.weight.detach()
    if stage.conv:
        # (out, in / groups, kh, kw) -> a row of one group's outputs for every input channel and tap
        out, per_group, kh, kw = weight.shape
        rows = weight.view(stage.groups, out // stage.groups, per_group, kh, kw).permute(0, 2, 3, 4, 1)
        rows = rows.reshape(-1, out // stage.groups)
        taps = (kh, kw, *stage.stride, *stage.padding, *stage.dilation, stage.groups)
    else:
        rows = weight.t()
        if H * W > 1:  # features of an image come channel first
            ih, iw = H // ph, W // pw
            rows = rows.view(C, ih, iw, -1).permute(1, 2, 0, 3).reshape(ih * iw * C, -1)
        taps = (1, 1, 1, 1, 0, 0, 1, 1, 1)
    bias = weight.new_zeros(weight.shape[0]) if stage.bias is None else stage.bias.detach()
    start = bias.repeat(OH * OW)
    return rows.contiguous(), start.contiguous(), (H, W, C, OH, OW, OC, ph, pw), taps, not stage.conv


def on_triton(device: torch.device) -> bool:
    """Whether events run in the Triton kernels: on a GPU, or where that backend is asked for."""
    return device.type != "cpu" or current_config().backend == "triton"


def simulate(stage: Stage, times: Tensor, values: Tensor, first_fire: int) -> StageRun:
    """As :func:`~snn_sparse_plugin.layers.ttfs.stages.integrate`, one spike at a time.

    Raises:
        InputError: a stage or spike times with which a kernel would index outside its buffers.
    """
    check_arriving(times, values)
    check_stage(stage, times.shape[1:], values)
    arriving = stage.pooled(times)
    rows, start, sizes, taps, dense = prepare(stage, arriving)
    image = arriving.permute(0, 2, 3, 1) if arriving.dim() == 4 else arriving
    flat = image.flatten(1).contiguous()
    OH, OW, OC = sizes[3:6]

    def back(tensor: Tensor) -> Tensor:
        if stage.conv:
            tensor = tensor.view(len(times), OH, OW, OC).permute(0, 3, 1, 2)
        return tensor.reshape(len(times), *stage.out_shape)

    if on_triton(times.device):
        return _on_triton(stage, flat, values, first_fire, (rows, start, sizes, taps, dense), back)

    from ...backends.cpu.ttfs_events import Synapses, run_layer

    if values.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f'the event simulator on CPU takes float32 and float64, this network is {values.dtype}: simulator="clock".'
        )
    calls["cpu", "ttfs_events"] += 1
    layer = Synapses(rows.numpy(), start.numpy(), sizes, taps, dense)
    thresholds = np.empty(0, layer.weight.dtype) if stage.table is None else stage.table[0].numpy()
    found = run_layer(flat.numpy(), values.numpy(), layer, thresholds, first_fire)
    u, synops = back(torch.from_numpy(found.u)), torch.from_numpy(found.synops)
    if stage.table is None:
        return StageRun(u, None, torch.zeros(len(times), dtype=torch.int64), synops)
    return StageRun(u, back(torch.from_numpy(found.times)), torch.from_numpy(found.spikes), synops)


def _on_triton(
    stage: Stage,
    flat: Tensor,
    values: Tensor,
    first_fire: int,
    layer: tuple,
    back: Callable[[Tensor], Tensor],
) -> StageRun:
    from ...triton_kernels import ttfs_events as kernels

    calls["triton", "ttfs_events"] += 1
    rows, start, sizes, taps, dense = layer
    steps = len(values)
    events = kernels.arriving(flat, values, sizes)
    u, synops = start.repeat(len(flat), 1), kernels.operations(events, len(flat), sizes, taps, dense)

    def add(some: range) -> None:
        kernels.add(events, u, rows, sizes, taps, dense, some)

    if stage.table is not None and first_fire < steps:
        times = on_the_clock(u, lambda k: add(range(k, k + 1)), steps, stage.table, first_fire)
    else:
        add(range(steps))
        unused = values.new_ones(())
        times = None if stage.table is None else ttfs(u, stage.table, unused, unused)[1]
    if times is None:
        return StageRun(back(u), None, torch.zeros_like(synops), synops)
    return StageRun(back(u), back(times), (times != SILENT).sum(1), synops)
