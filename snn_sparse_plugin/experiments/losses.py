"""The published losses: cross entropy on the readout, and penalties on the activity of hidden layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .settings import Settings

UPPER, LOWER, FLOOR = 0.06, 100.0, 1e-3


def scores(mem: Tensor, settings: Settings) -> Tensor:
    """One score per class, (B, classes), from the readout's membrane (T, B, classes)."""
    # not amax, which shares its gradient among equal steps
    return mem.max(0).values if settings.readout == "max" else mem.sum(0)


def loss(mem: Tensor, target: Tensor, counts: Iterable[Tensor], settings: Settings) -> tuple[Tensor, Tensor]:
    """Cross entropy alone, and with the penalties on the spike counts (B, N...) of each hidden layer."""
    entropy = F.cross_entropy(scores(mem, settings), target)
    return entropy, entropy + sum(penalty(c.flatten(1), settings) for c in counts)


def penalty(counts: Tensor, settings: Settings) -> Tensor:
    """0.06 relu(mean spikes of a neuron - target) + 100 relu(1e-3 - spikes)^2, mean over samples and neurons."""
    upper = torch.relu(counts.mean(1) - settings.target).mean()
    lower = torch.relu(FLOOR - counts).square().mean()
    return UPPER * upper + LOWER * lower
