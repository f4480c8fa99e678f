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
def _keep(x, window, least, keep):  # type: ignore[no-untyped-def]
    """``keep`` (S, N): near the threshold, or of a neuron with fewer than ``least`` such samples; how many of each."""
    S, N = x.shape
    limit = x.dtype.type(window)
    counts = np.zeros(N, np.int32)
    for s in range(S):
        for n in range(N):
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


def keep(x: Tensor, window: float, min_active: float) -> tuple[Tensor, int, int]:
    """Which elements of ``x`` (S, N), membrane minus threshold, pass a gradient: -> (bool (S, N), how many are near,
    how many pass). A neuron that is near in a smaller fraction of the S samples than ``min_active`` passes all."""
    found = torch.empty(x.shape, dtype=torch.bool)
    near, kept = _keep(array(x), window, min_active * x.shape[0], array(found))
    return found, near, kept


def passed(grad: Tensor, x: Tensor, keep: Tensor, surrogate: Surrogate) -> Tensor:
    """``grad`` times the surrogate's derivative at ``x`` where ``keep``, else 0; all (S, N)."""
    out = torch.empty_like(x)
    _pass(array(grad), array(x), array(keep), surrogate.code, *surrogate.packed, array(out))
    return out
