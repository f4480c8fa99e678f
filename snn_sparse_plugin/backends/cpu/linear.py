"""Backward kernel over the active list for neurons whose adjoint is linear: the commonest ones, feed-forward and
reset by a detached subtraction or not at all.

What enters the adjoint at an active entry is then known beforehand, so a block of steps is swept at once: all entries
are scattered into the block, and two first-order recurrences run down its columns in registers,

    lam_t = entry_t + mem lam_{t+1}        nu_t = lam_t + syn nu_{t+1}
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from .bits import LANES
from .jit import kernel
from .lanes import add, fma, load, mul, store, zeros
from .outgoing import add_all, deliver, rows_of_entries
from .rows import DECAY, MEM, NONE, SUBTRACT, SYN, Code, copy_row

LINEAR_ROWS = 6
"""Two each, for lam and nu: what flows to the next step back, what it decays by, and their sums, with which the
gradient of the bias costs no pass of its own."""


def is_linear(code: Code) -> bool:
    """Whether this member of the neuron family has a linear adjoint that ``backward_linear_kernel`` knows."""
    update, _, kind, _, _, attached, _, recurrent = code
    return update == DECAY and kind in (NONE, SUBTRACT) and not attached and not recurrent


def backward_linear_kernel(code: Code) -> Callable[..., Any]:
    """The backward over the active list for a linear adjoint; takes the arguments of ``backward_active``."""
    return _backward_linear_kernel(bool(code[1]))


@cache
def _backward_linear_kernel(synapse: bool) -> Callable[..., Any]:

    @kernel()
    def backward_linear(  # type: ignore[no-untyped-def]
        first,
        last,
        T,
        params,
        v0,
        _,
        incoming,
        active,
        _act_x,
        phi,  # the surrogate's derivative there
        block,
        arriving,
        lam_state,
        ci_state,
        outgoing,
        rows,  # its own, zeros: LINEAR_ROWS
    ):
        g_mem = arriving[2]
        N, width = v0.shape[1], block.shape[1]
        has_mem = g_mem.shape[0] > 0
        flow, decay, sums = rows[:2], rows[2:4], rows[4:]
        copy_row(decay[0, :N], params[MEM])
        copy_row(decay[1, :N], params[SYN])
        g_weight, g_bias, g_active, g_current, g_rec_weight, g_rec_bias, g_rec0 = outgoing
        unbiased = (g_weight, g_bias[:0], g_active, g_current, g_rec_weight, g_rec_bias, g_rec0)
        high, membrane, current = last * T, np.int64(0), np.int64(1)
        while high > first * T:
            low = max(first * T, (high - 1) // block.shape[0] * block.shape[0])
            shift = low % block.shape[0]
            for r in range(low, high):
                k = np.uint64(shift + r - low)
                if has_mem:
                    t, b = np.uint64(r % T), np.uint64(r // T)
                    for j in range(N):
                        block[k, j] = g_mem[t, b, j]
                else:
                    for column in range(0, width, LANES):
                        store(block, k, column, zeros(block))
            scatter(block, shift, low, high, T, active, phi, arriving)
            # sample by sample, as the state of each comes in and goes out
            top = high
            while top > low:
                b = (top - 1) // T
                bottom = max(low, b * T)
                if top == b * T + T:
                    copy_row(flow[0, :N], lam_state[b])
                    copy_row(flow[1, :N], ci_state[b])
                sweep(block, shift + bottom - low, shift + top - low, decay, flow, sums, membrane)
                if synapse:
                    sweep(block, shift + bottom - low, shift + top - low, decay, flow, sums, current)
                if bottom == b * T:
                    copy_row(lam_state[b], flow[0])
                    copy_row(ci_state[b], flow[1])
                top = bottom
            deliver(block, shift, low, high, T, incoming, unbiased)
            high = low
        if g_bias.shape[0] > 0:
            add_all(g_bias, sums, current if synapse else membrane, current)

    return backward_linear


@kernel(part=True, allocates=True)
def scatter(block, first, low, high, T, active, phi, arriving):  # type: ignore[no-untyped-def]
    """What enters the adjoint at the active entries of the rows low..high."""
    act_ptr, act_idx = active
    g_out, g_spikes, _ = arriving
    has_out, has_spikes = g_out.shape[0] > 0, g_spikes.shape[0] > 0
    begin, end = act_ptr[low], act_ptr[high]
    owners = rows_of_entries(act_ptr, act_idx, low, high, first)
    for e in range(end - begin):
        k, entry = np.uint64(owners[0, np.uint64(e)]), np.uint64(act_idx[np.uint64(begin + e)])
        g = block.dtype.type(0)
        if has_out:
            g = g_out[begin + e]
        if has_spikes:
            row = low + np.int64(k) - first
            g += g_spikes[row % T, row // T, entry]
        block[k, entry] += phi[begin + e] * g


@kernel(part=True)
def sweep(block, low, high, decay, flow, sums, which):  # type: ignore[no-untyped-def]
    """``x[k] = block[k] + decay x[k + 1]`` down the rows high..low in place; ``flow`` is the decayed x around them.

    The x are added to ``sums``.
    """
    width, lanes = np.uint64(block.shape[1]), np.uint64(LANES)
    j = np.uint64(0)
    # two chains at a time hide the latency of one; four need more registers than AVX2 has
    while j + np.uint64(2) * lanes <= width:
        p, k = j + lanes, np.uint64(high - 1)
        m, n = load(decay, which, j), load(decay, which, p)
        a, b = add(load(block, k, j), load(flow, which, j)), add(load(block, k, p), load(flow, which, p))
        v, w = add(load(sums, which, j), a), add(load(sums, which, p), b)
        for i in range(low + 1, high):
            store(block, k, j, a)
            store(block, k, p, b)
            k = np.uint64(low + high - 1 - i)
            a, b = fma(m, a, load(block, k, j)), fma(n, b, load(block, k, p))
            v, w = add(v, a), add(w, b)
        store(block, k, j, a)
        store(block, k, p, b)
        store(flow, which, j, mul(m, a))
        store(flow, which, p, mul(n, b))
        store(sums, which, j, v)
        store(sums, which, p, w)
        j += np.uint64(2) * lanes
    if j < width:
        m, k = load(decay, which, j), np.uint64(high - 1)
        a = add(load(block, k, j), load(flow, which, j))
        v = add(load(sums, which, j), a)
        for i in range(low + 1, high):
            store(block, k, j, a)
            k = np.uint64(low + high - 1 - i)
            a = fma(m, a, load(block, k, j))
            v = add(v, a)
        store(block, k, j, a)
        store(flow, which, j, mul(m, a))
        store(sums, which, j, v)
