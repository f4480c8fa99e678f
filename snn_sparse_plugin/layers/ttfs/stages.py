"""One layer of the spiking network: how spikes reach the synapses, the synapses, and the neurons behind them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.ttfs import SILENT

Pair = tuple[int, int]


@dataclass(frozen=True)
class Pool:
    """Pooling of a window of spikes: the earliest passes (``max``), or all pass, each divided (``avg``)."""

    kind: str
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil: bool = False

    def earliest(self, times: Tensor) -> Tensor:
        """Max pooling on spike times (B, C, H, W)."""
        late = F.max_pool2d(-times.float(), self.kernel, self.stride, self.padding, self.dilation, self.ceil)
        return (-late).clamp(max=SILENT).to(torch.uint8)  # a dilated window can lie in the padding alone

    def average(self, x: Tensor) -> Tensor:
        """Average pooling of values (B, C, H, W)."""
        return F.avg_pool2d(x, self.kernel, self.stride)


@dataclass
class Stage:
    """Synapses and neurons of one layer; shapes without the batch.

    ``before`` are poolings of the incoming spikes, ``after`` of the outgoing ones. ``table`` is None for a readout.
    """

    name: str
    weight: Tensor  # (out, in), or (out, in / groups, kh, kw)
    bias: Tensor | None
    in_shape: tuple[int, ...]  # of the spikes that arrive, before pooling
    out_shape: tuple[int, ...]  # of the neurons
    table: Tensor | None
    before: list[Pool] = field(default_factory=list)
    after: list[Pool] = field(default_factory=list)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    flatten_after: bool = False

    @property
    def conv(self) -> bool:
        return self.weight.dim() == 4

    @property
    def neurons(self) -> int:
        return math.prod(self.out_shape)

    @property
    def window(self) -> int:
        return 0 if self.table is None else self.table.shape[1]

    @property
    def macs(self) -> int:
        """Multiplications of the dense layer, per sample; a padded border counts."""
        return self.neurons * math.prod(self.weight.shape[1:])

    @property
    def average(self) -> Pool | None:
        return next((p for p in self.before if p.kind == "avg"), None)

    def pooled(self, times: Tensor) -> Tensor:
        """Incoming spike times, shaped as this stage takes them, after max pooling."""
        times = times.reshape(len(times), *self.in_shape)
        for pool in self.before:
            if pool.kind == "max":
                times = pool.earliest(times)
        return times

    def passed_on(self, times: Tensor) -> Tensor:
        """The neurons' spike times as the next stage sees them."""
        for pool in self.after:
            times = pool.earliest(times)
        return times.flatten(1) if self.flatten_after else times

    def synapses(self, x: Tensor, bias: bool = False) -> Tensor:
        """The weighted sum of values (B, …) that passed the max pooling."""
        b = self.bias if bias else None
        if self.average is not None:
            x = self.average.average(x)
        if self.conv:
            return F.conv2d(x, self.weight, b, self.stride, self.padding, self.dilation, self.groups)
        return F.linear(x.flatten(1), self.weight, b)

    def start(self, batch: int) -> Tensor:
        """The membrane before any spike: the bias, (B, …)."""
        shape = (batch, *self.out_shape)
        if self.bias is None:
            return self.weight.new_zeros(shape)
        bias = self.bias.view(-1, 1, 1) if self.conv else self.bias
        return bias.expand(shape).clone()

    def to(self, *args: Any, **kwargs: Any) -> Stage:
        """A copy with its tensors moved or cast."""
        moved = {k: None if (t := getattr(self, k)) is None else t.to(*args, **kwargs) for k in TENSORS}
        return Stage(**{**vars(self), **moved})


TENSORS = ("weight", "bias", "table")


def integrate(stage: Stage, times: Tensor, values: Tensor, first_fire: int) -> tuple[Tensor, Tensor | None]:
    """Run one stage on the clock: -> membrane after all steps (B, …), and spike times (B, …) or None.

    Step k adds the spikes of time k, all samples and neurons at once. From step ``first_fire`` on the threshold
    falls by one entry a step. ``first_fire`` as long as the incoming window waits for all spikes; less fires early.
    """
    u = stage.start(times.shape[0])
    arriving = stage.pooled(times)

    def add(k: int) -> None:
        u.add_(stage.synapses((arriving == k).to(u.dtype) * values[k]))

    return u, on_the_clock(u, add, values.numel(), stage.table, first_fire)


def on_the_clock(
    u: Tensor, add: Callable[[int], None], steps: int, table: Tensor | None, first_fire: int
) -> Tensor | None:
    """Spike times of membranes ``u`` to which ``add(k)`` adds the spikes of step k; None without a table."""
    window = 0 if table is None else table.shape[1]
    out = torch.full_like(u, SILENT, dtype=torch.uint8)
    for k in range(max(steps, first_fire + window)):
        if k < steps:
            add(k)
        j = k - first_fire
        if table is not None and 0 <= j < window:
            out.masked_fill_((out == SILENT) & (u >= table[0, j]), j)
    return None if table is None else out
