"""Spikes of each neuron over some steps, counted from events, and the gradient of the counts at active entries."""

from __future__ import annotations

import torch
from torch import Tensor

from .jit import kernel
from .memory import array
from .threads import parallel, split

SMALLEST = 1 << 17
"""Neuron-steps from which on the work is shared among threads."""


@kernel()
def _add(first, last, T, begin, end, indptr, indices, values, out):  # type: ignore[no-untyped-def]
    graded = values.shape[0] > 0
    one = out.dtype.type(1)
    for b in range(first, last):
        for k in range(indptr[b * T + begin], indptr[b * T + end]):
            out[b, indices[k]] += values[k] if graded else one


@kernel()
def _pick(first, last, T, indptr, indices, grad, out):  # type: ignore[no-untyped-def]
    for b in range(first, last):
        for k in range(indptr[b * T], indptr[(b + 1) * T]):
            out[k] = grad[b, indices[k]]


def count_events(
    indptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    steps: range | None = None,
) -> Tensor:
    """Sums (B, N) over the steps of a CSR pattern of shape (T, B, N), rows ``b * T + t``; float32 or float64.

    ``steps``: successive ones to sum over instead of all.
    """
    T, B, N = shape
    begin, end = (0, T) if steps is None else (steps.start, steps.stop)
    out = torch.zeros(B, N, dtype=dtype)
    pattern, sums = (array(indptr), array(indices)), array(out)
    numbers = sums[0, :0] if values is None else array(values)
    if (end - begin) * B * N <= SMALLEST:  # not worth waking another thread
        _add(0, B, T, begin, end, *pattern, numbers, sums)
    else:
        ranges = split(B)
        parallel([lambda r=r: _add(*r, T, begin, end, *pattern, numbers, sums) for r in ranges])  # type: ignore[misc]
    return out


def pick_counts(indptr: Tensor, indices: Tensor, grad: Tensor, T: int) -> Tensor:
    """The entry of ``grad`` (B, N) that belongs to each entry of a CSR pattern over rows ``b * T + t``."""
    out = torch.empty(indices.numel(), dtype=grad.dtype)
    arrays = [array(x) for x in (indptr, indices, grad, out)]
    parallel([lambda r=r: _pick(*r, T, *arrays) for r in split(len(grad))])  # type: ignore[misc]
    return out
