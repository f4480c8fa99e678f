"""Single steps of upstream's own forward: which gradients pass a window, and what they become."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...core.surrogates import Surrogate
from .jit import kernel
from .memory import array
from .surrogate import surrogate_row


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


BLOCK = 1024
"""Numbers whose derivatives wait in cache for the gradient."""


@kernel()
def _pass(grad, x, keep, kind, first, second, out):  # type: ignore[no-untyped-def]
    slope = np.empty(BLOCK, x.dtype)
    zero = x.dtype.type(0)
    for start in range(0, len(x), BLOCK):
        here = x[start : start + BLOCK]
        surrogate_row(kind, first, second, -1.0, here, slope)
        for n in range(len(here)):
            out[start + n] = grad[start + n] * slope[n] if keep[start + n] else zero


def fire(x: Tensor, S: int, window: float, min_active: float) -> tuple[Tensor, np.ndarray, int, int]:
    """Spikes of ``x``, membrane minus threshold, and which of its elements pass a gradient: -> (spikes, bool (S, N),
    how many are near, how many pass). ``S``: a neuron has this many samples, the rows of ``x``. One that is near in a
    smaller fraction of them than ``min_active`` passes all."""
    spikes, rows = torch.empty_like(x), array(x).reshape(S, -1)
    keep = np.empty(rows.shape, np.bool_)
    near, kept = _fire(rows, window, min_active * S, array(spikes).reshape(S, -1), keep)
    return spikes, keep, near, kept


def passed(grad: Tensor, x: Tensor, keep: np.ndarray, surrogate: Surrogate) -> Tensor:
    """``grad`` times the surrogate's derivative at ``x`` where ``keep``, else 0."""
    out = torch.empty_like(x)
    numbers = array(grad).reshape(-1), array(x).reshape(-1), keep.reshape(-1)
    _pass(*numbers, surrogate.code, *surrogate.packed, array(out).reshape(-1))
    return out
