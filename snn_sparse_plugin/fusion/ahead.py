"""What can be done for a step loop while it is still being recorded: looking for the events of its input."""

from __future__ import annotations

import torch

from ..core.config import SparseConfig
from ..ops.spiking_layer.products import DENSE_ABOVE
from .arguments import Slices
from .context import casts
from .nodes import InputNode

ENOUGH = 8
"""Successive slices of one tensor after which more are expected."""

SMALLEST = 1 << 14
"""Numbers in a step below which waking a thread takes longer than looking at them."""


def begin(node: InputNode, config: SparseConfig) -> None:
    """Look for events in the node's inputs, now and in those to come, where running it would do so later."""
    slices = Slices.of(node.arguments[0])
    if slices is None:
        return
    node.arguments[0] = slices
    if node.device.type != "cpu" or config.backend not in ("auto", "cpu") or torch.get_num_threads() < 2:
        return
    if (
        len(node.shape) != 2
        or casts(node.mode)
        or node.dtypes[0] != torch.float32
        or node.shape.numel() < SMALLEST
        or not slices.contiguous()
        or not _feeds_neurons(node)
    ):
        return
    from ..backends.cpu.ahead import Ahead

    node.begun = Ahead(slices.whole(slices.capacity()), len(slices), DENSE_ABOVE)


def _feeds_neurons(node: InputNode) -> bool:
    """Whether the layer's results were neurons' inputs."""
    linears = list(node.linears.values())
    return any(neuron.arguments[0].source in linears for neuron in node.record.neurons.values())
