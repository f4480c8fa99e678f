"""Single steps of upstream's own forward: which gradients pass a window, and what they become."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...core.surrogates import Surrogate
from .jit import kernel
from .memory import array
from .surrogate import surrogate_row


@kernel(allocates=True)
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


@kernel(allocates=True)
def _pass(grad, x, keep, kind, first, second, out):  # type: ignore[no-untyped-def]
    S, N = keep.shape
    slope = np.empty(BLOCK, x.dtype)
    zero = x.dtype.type(0)
    for s in range(S):
        for start in range(0, N, BLOCK):
            here = x[s, start : start + BLOCK]
            surrogate_row(kind, first, second, -1.0, here, slope[: len(here)])
            for n in range(len(here)):
                out[s, start + n] = grad[s, start + n] * slope[n] if keep[s, start + n] else zero


def fire(x: Tensor, S: int, window: float, min_active: float) -> tuple[Tensor, np.ndarray, int, int]:
    """Spikes of ``x``, membrane minus threshold, and which of its elements pass a gradient: -> (spikes, bool (S, N),
    how many are near, how many pass). ``S``: a neuron has this many samples, the rows of ``x``. One that is near in a
    smaller fraction of them than ``min_active`` passes all."""
    shape, spikes = (S, x.numel() // S), torch.empty_like(x)
    keep = np.empty(shape, np.bool_)
    near, kept = _fire(array(x, shape), window, min_active * S, array(spikes, shape), keep)
    return spikes, keep, near, kept


def passed(grad: Tensor, x: Tensor, keep: np.ndarray, surrogate: Surrogate) -> Tensor:
    """``grad`` times the surrogate's derivative at ``x`` where ``keep``, else 0."""
    shape, out = keep.shape, torch.empty_like(x)
    _pass(array(grad, shape), array(x, shape), keep, *surrogate.numbers, array(out, shape))
    return out
