"""The specification: encode by comparison, decode by table, straight-through gradients; any device and dtype.

Time-to-first-spike coding after Park & Yoon, arXiv 2106.02568. With ``t_f`` the exact firing time of x:

    t = first k with x >= threshold_k (none: silent);  xhat = value_t, 0 where silent
    pruned     x < threshold_{T-1}: no gradient
    clipped    x > value_0 = x_M:   d/dtau = -slope(x_M) t_d / tau^2, d/dt_d = slope(x_M) / tau
    quantised  between:             d/dx = slope(xhat) / slope(x), d/dtau = slope(xhat) (t - t_f) / tau^2, d/dt_d = 0
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import SILENT, Kernel


def encode(x: Tensor, table: Tensor) -> Tensor:
    """Spike times, uint8 of x's shape: the first step whose threshold x reaches, :data:`SILENT` for none and NaN."""
    thresholds = table[0]
    times = torch.searchsorted(-thresholds, -x.contiguous(), side="left")
    silent = (times >= thresholds.numel()) | x.isnan()
    return times.masked_fill(silent, SILENT).to(torch.uint8)


def decode(times: Tensor, table: Tensor) -> Tensor:
    """What the spikes are worth: the value of each step, 0 where silent."""
    values = table.new_zeros(SILENT + 1)
    values[: table.shape[1]] = table[1]
    return values[times.int()]


def forward(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """xhat and the spike times; a NaN stays one."""
    times = encode(x, table)
    return torch.where(x.isnan(), x, decode(times, table)), times


def backward(
    grad: Tensor, x: Tensor, times: Tensor, table: Tensor, tau: Tensor, t_d: Tensor, kernel: Kernel
) -> tuple[Tensor, Tensor, Tensor]:
    """Straight-through gradients of x, tau and t_d."""
    largest = table[1, 0]
    fired = times != SILENT
    clipped = fired & (x > largest)
    quantised = fired & ~clipped
    value = decode(times, table)
    safe = torch.where(quantised, x, largest)
    ratio = torch.where(quantised, kernel.slope(value) / kernel.slope(safe), torch.zeros_like(x))
    ratio = torch.where(x.isnan(), x, ratio)
    late = torch.where(quantised, times - (t_d - tau * kernel.inverse(safe)), torch.zeros_like(x))
    at_clip = kernel.slope(largest) * (grad * clipped).sum()
    d_tau = (grad * kernel.slope(value) * late).sum() / tau**2 - at_clip * t_d / tau**2
    return grad * ratio, d_tau.to(tau.dtype), (at_clip / tau).to(t_d.dtype)
