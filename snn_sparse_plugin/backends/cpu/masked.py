"""Single steps of upstream's own forward: which gradients pass a window, and what they become."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...core.surrogates import Surrogate
from .jit import kernel
from .memory import array
from .rows import surrogate_row


@kernel()
def _fire(x, window, least, spikes, keep):  # type: ignore[no-untyped-def]
    """``keep`` (S, N): near the threshold, or of a neuron with fewer than ``least`` such samples; how many of each."""
    S, N = x.shape
    limit, one, zero = x.dtype.type(window), x.dtype.type(1), x.dtype.type(0)
    counts = np.zeros(N, np.int32)
    for s in range(S):
        for n in range(N):
            spikes[s, n] = one if x[s, n] > zero else zero
            near = abs(x[s, n]) < limit
            keep[s, n] = near
            counts[n] += np.int32(near)
    total, kept = 0, 0
    for n in range(N):
        total += counts[n]
        kept += S if counts[n] < least else counts[n]
    if kept > total:
        for s in range(S):
            for n in range(N):
                keep[s, n] |= counts[n] < least
    return total, kept


@kernel()
def _pass(grad, x, keep, kind, first, second, out):  # type: ignore[no-untyped-def]
    S, N = x.shape
    slope = np.empty(N, x.dtype)
    zero = x.dtype.type(0)
    for s in range(S):
        surrogate_row(kind, first, second, -1.0, x[s], slope)
        for n in range(N):
            out[s, n] = grad[s, n] * slope[n] if keep[s, n] else zero


def fire(x: Tensor, S: int, window: float, min_active: float) -> tuple[Tensor, Tensor, int, int]:
    """Spikes of ``x``, membrane minus threshold, and which of its elements pass a gradient: -> (spikes, bool, how many
    are near, how many pass). ``S``: a neuron has this many samples, the rows of ``x``. One that is near in a smaller
    fraction of them than ``min_active`` passes all."""
    spikes, keep = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    rows = [array(t).reshape(S, -1) for t in (x, spikes, keep)]
    near, kept = _fire(rows[0], window, min_active * S, rows[1], rows[2])
    return spikes, keep, near, kept


def passed(grad: Tensor, x: Tensor, keep: Tensor, surrogate: Surrogate) -> Tensor:
    """``grad`` times the surrogate's derivative at ``x`` where ``keep``, else 0."""
    out, N = torch.empty_like(x), x.shape[-1]
    rows = [array(t).reshape(-1, N) for t in (grad, x, keep, out)]
    _pass(*rows[:3], surrogate.code, *surrogate.packed, rows[3])
    return out
