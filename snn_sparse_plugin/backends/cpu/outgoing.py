"""What leaves a layer in its backward: gradients of weights, biases and input, from nu = dE/d(input current).

The adjoint kernels fill a block of nu rows, one per (sample, step) in the order of ``indptr``, and deliver it when it
is full. With the events of a block sorted by input a row of dW is read and written once per four events instead of
at every event, and the nu rows of a block are still in cache.
"""

from __future__ import annotations

import numpy as np

from .jit import kernel
from .rows import add_rows, dots

BLOCK_ITEMS = 1 << 16  # of the block: 256 KiB of float32, a share of the second-level cache


def block_rows(n: int) -> int:
    """How many rows of ``n`` neurons make a block."""
    return max(16, min(512, BLOCK_ITEMS // max(n, 1)))


@kernel()
def deliver(  # type: ignore[no-untyped-def]
    block,  # (rows, N or more): row r % rows is nu of r = b * T + t
    low,
    high,  # the rows low..high are delivered
    T,
    indptr,
    indices,
    values,
    weight,
    in_ptr,
    in_idx,
    out_ptr,
    out_idx,
    g_weight,  # (M, N) of this range, and so on: empty where not wanted
    g_bias,
    g_active,
    g_current,
    g_rec_weight,
    g_rec_bias,
    g_rec0,
):
    """Add a block of nu rows to everything that wants it."""
    first = low % block.shape[0]
    if g_weight.shape[0] > 0:
        _weight_grad(block, first, low, high, T, 0, indptr, indices, values, g_weight)
    if g_bias.shape[0] > 0:
        N = g_bias.shape[0]
        for r in range(low, high):
            k = np.uint64(first + r - low)
            for j in range(N):
                g_bias[j] += block[k, j]
    if g_active.shape[0] > 0:
        for r in range(low, high):
            dots(weight, in_idx, in_ptr[r], in_ptr[r + 1], block, first + r - low, g_active)
    if g_current.shape[0] > 0:
        N = g_current.shape[2]
        for r in range(low, high):
            k, t, b = np.uint64(first + r - low), np.uint64(r % T), np.uint64(r // T)
            for j in range(N):
                g_current[t, b, j] = block[k, j]
    # the spikes of step t - 1 drove the recurrent input of step t, and rec0 that of the first
    if g_rec_weight.shape[0] > 0:
        _weight_grad(block, first, low, high, T, 1, out_ptr, out_idx, values[:0], g_rec_weight)
    if g_rec_bias.shape[0] > 0 or g_rec0.shape[0] > 0:
        N = max(g_rec_bias.shape[0], g_rec0.shape[1])
        for r in range(low, high):
            k, b = np.uint64(first + r - low), np.uint64(r // T)
            if r % T > 0:
                for j in range(g_rec_bias.shape[0]):
                    g_rec_bias[j] += block[k, j]
            elif g_rec0.shape[0] > 0:
                for j in range(N):
                    g_rec0[b, j] = block[k, j]


@kernel()
def _weight_grad(block, first, low, high, T, lag, ptr, indices, values, out):  # type: ignore[no-untyped-def]
    """``out[i] += nu`` for every event i of ``lag`` steps before: a counting sort by i, then a sum for every i."""
    starts = np.zeros(out.shape[0] + 1, np.int32)
    begin, end = ptr[max(low - lag, 0)], ptr[high - lag]
    for e in range(begin, end):
        starts[np.uint32(indices[e]) + np.uint32(1)] += 1
    for i in range(out.shape[0]):
        starts[i + 1] += starts[i]
    filled = starts.copy()
    rows = np.empty(end - begin, np.int32)
    scaled = np.empty(end - begin if values.shape[0] > 0 else 0, values.dtype)
    for r in range(low, high):
        if lag > 0 and r % T == 0:
            continue
        for e in range(ptr[r - lag], ptr[r - lag + 1]):
            column = np.uint32(indices[e])
            at = filled[column]
            rows[np.uint32(at)] = first + r - low
            if scaled.shape[0] > 0:
                scaled[np.uint32(at)] = values[e]
            filled[column] = at + 1
    for i in range(out.shape[0]):
        add_rows(out, i, block, rows, scaled, starts[i], filled[i])
