"""The event-by-event simulator of a stage: prepares memory orders for the compiled kernels, and back."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...backends import calls
from .stages import Stage


class StageRun(NamedTuple):
    """One stage's neurons: membranes (B, …), spike times (B, …) uint8 or None, spikes and operations (B,)."""

    u: Tensor
    times: Tensor | None
    spikes: Tensor
    synops: Tensor


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Rows, columns, channels; a flat layer is one position."""
    return (shape[1], shape[2], shape[0]) if len(shape) == 3 else (1, 1, math.prod(shape))


def _pooled_shape(stage: Stage, batch: Tensor) -> tuple[int, int, int]:
    return _image(tuple(batch.shape[1:]))


def prepare(stage: Stage, arriving: Tensor) -> tuple:
    """The stage's weights in the kernels' order, for incoming spikes of this shape (B, …)."""
    H, W, C = _pooled_shape(stage, arriving)
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
    sizes = (H, W, C, OH, OW, OC, ph, pw)
    return rows.contiguous().numpy(), start.contiguous().numpy(), sizes, taps, not stage.conv


def simulate(stage: Stage, times: Tensor, values: Tensor, first_fire: int) -> StageRun:
    """As :func:`~snn_sparse_plugin.layers.ttfs.stages.integrate`, one spike at a time; CPU tensors."""
    from ...backends.cpu.ttfs_events import Synapses, run_layer

    calls["cpu", "ttfs_events"] += 1
    arriving = stage.pooled(times)
    layer = Synapses(*prepare(stage, arriving))
    image = arriving.permute(0, 2, 3, 1) if arriving.dim() == 4 else arriving
    thresholds = np.empty(0, layer.weight.dtype) if stage.table is None else stage.table[0].numpy()
    found = run_layer(image.flatten(1).contiguous().numpy(), values.numpy(), layer, thresholds, first_fire)
    OH, OW, OC = layer.sizes[3:6]

    def back(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if stage.conv:
            tensor = tensor.view(len(times), OH, OW, OC).permute(0, 3, 1, 2)
        return tensor.reshape(len(times), *stage.out_shape)

    spiked = stage.table is not None
    spikes = torch.from_numpy(found.spikes) if spiked else torch.zeros(times.shape[0], dtype=torch.int64)
    return StageRun(
        back(found.u), back(found.times) if spiked else None, spikes, torch.from_numpy(found.synops)
    )
