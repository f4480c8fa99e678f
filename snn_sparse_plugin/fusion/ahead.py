"""What can be done for a step loop while it is still being recorded: looking for the events of its input."""

from __future__ import annotations

import torch

from ..core.config import SparseConfig
from ..ops.spiking_layer.products import DENSE_ABOVE
from .columns import Slices
from .record import InputLane

ENOUGH = 8
"""Successive slices of one tensor after which more are expected."""

SMALLEST = 1 << 14
"""Numbers in a step below which waking a thread takes longer than looking at them."""


def begin(lane: InputLane, config: SparseConfig) -> None:
    """Look for events in the lane's inputs, now and in those to come, where running it would do so later."""
    slices = Slices.of(lane.columns[0])
    if slices is None:
        return
    lane.columns[0] = slices
    if lane.device.type != "cpu" or config.backend not in ("auto", "cpu") or torch.get_num_threads() < 2:
        return
    if (
        len(lane.shape) != 2
        or lane.shape.numel() < SMALLEST
        or not slices.contiguous()
        or not _feeds_neurons(lane)
    ):
        return
    from ..backends.cpu.ahead import Ahead

    lane.begun = Ahead(slices.whole(slices.capacity()), len(slices), DENSE_ABOVE)


def _feeds_neurons(lane: InputLane) -> bool:
    """Whether the layer's results were neurons' inputs."""
    linears = list(lane.linears.values())
    return any(neuron.columns[0].source in linears for neuron in lane.record.neurons.values())
