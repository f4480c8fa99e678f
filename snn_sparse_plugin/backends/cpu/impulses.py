"""Backward kernel over the active list where, moreover, one decay is shared by all neurons of a linear adjoint.

What arrives at an active entry is an impulse x at neuron j, and what it does to the steps before is to decay:

    nu_t = d^(h - t) m        W^T nu_t = d^(h - t) y        m_j += x / d^(h - t)        y += x / d^(h - t) W_j

So no row of nu is ever swept or stored. m and y stay in the first-level cache and change by impulses alone; who reads
them multiplies. The step h that they refer to moves on before the powers of d leave the range where they are exact.
Each event adds a row to the gradient of the weights, in the order of time: cheaper where few come in (see way.py).
"""

from __future__ import annotations

import numpy as np

from .bits import LANES
from .jit import kernel
from .lanes import along, fma, load, mul, splat, store

SMALLEST = 1e-6  # power of the decay (or of its inverse) at which m and y are scaled anew

READ = 8  # entries of the input's active list that are read at once


@kernel()
def backward_impulses(  # type: ignore[no-untyped-def]
    first,
    last,
    T,
    decay,
    incoming,
    active,
    phi,  # the surrogate's derivative there; then times the gradient that arrives
    arriving,
    flow,  # (B, N): what flows to the last step from the state after it; then from the first step to the state before
    sums,  # m and y, each one row of whole vectors
    outgoing,
    table,  # (3, T + 1): room for the decay's powers
):
    """Samples first..last. Rows of ``weight`` are W_j; the gradient's rows, ``g_weight``, are those of W^T."""
    act_ptr, act_idx = active
    indptr, indices, values, weight, in_ptr, in_idx = incoming
    g_out, g_spikes = arriving
    g_weight, g_bias, g_active = outgoing
    m, y = sums
    dtype, N = flow.dtype, flow.shape[1]
    reads = g_active.shape[0] > 0
    span = powers(decay, T, table)
    scale, inverse, series = table[0], table[1], table[2]
    floor = in_ptr[first * T] if reads else 0
    for b in range(last - 1, first - 1, -1):
        for column in range(m.shape[1]):
            m[0, column] = 0
        for column in range(y.shape[1]):  # not times zero: what stood there before may be NaN
            y[0, column] = 0
        for neuron in range(N):
            if flow[b, neuron] != 0:
                x = flow[b, neuron]
                m[0, neuron] = x
                if g_bias.shape[0] > 0:
                    g_bias[0, neuron] += x * series[T - 1]
                if reads:
                    add_row(y.shape[1], (y, np.uint64(0), splat(x), weight, np.uint64(neuron)))
        begin = act_ptr[b * T]
        arrived = phi[begin : act_ptr[b * T + T]]
        arrive(arrived, b, T, begin, act_ptr, act_idx, g_out, g_spikes)
        n = np.uint64(0)
        for back in range(T):
            t = np.uint64(T - 1 - back)
            r = np.uint64(b * T) + t
            if n == np.uint64(span):
                shrink(m, scale[n])
                shrink(y, scale[n])
                n = np.uint64(0)
            at, end = act_ptr[r] - begin, act_ptr[r + np.uint64(1)] - begin
            while at < end:  # two at a time, to read y once; the second of an odd last is nothing
                e, f = np.uint64(at), np.uint64(min(at + 1, end - 1))
                i, j = np.uint64(act_idx[np.uint64(begin) + e]), np.uint64(act_idx[np.uint64(begin) + f])
                p, q = arrived[e], arrived[f] * dtype.type(min(end - 1 - at, 1))
                if g_bias.shape[0] > 0:
                    g_bias[0, i] += p * series[t]
                    g_bias[0, j] += q * series[t]
                p, q = p * inverse[n], q * inverse[n]
                m[0, i] += p
                m[0, j] += q
                if reads:
                    add_rows(y.shape[1], (y, weight, i, splat(p), j, splat(q)))
                at += 2
            if reads:
                read(y, in_idx, floor, in_ptr[r], in_ptr[r + np.uint64(1)], scale[n], g_active)
            if g_weight.shape[0] > 0:
                add_events(g_weight, indices, values, indptr[r], indptr[r + np.uint64(1)], m, scale[n])
            n += np.uint64(1)
        for neuron in range(N):
            flow[b, neuron] = m[0, neuron] * scale[n]


@kernel(forceinline=True)
def powers(decay, T, out):  # type: ignore[no-untyped-def]
    """Three rows: d^n and d^-n while both are exact, and the sums of d^0 to d^t for each step t. It returns how
    many powers are exact; of d^n there is one more."""
    span, power = 1, float(decay)
    while span < T and SMALLEST <= abs(power) <= 1.0 / SMALLEST:
        power *= decay
        span += 1
    power, total = 1.0, 0.0
    for n in range(T):
        if n < span:
            out[0, n], out[1, n] = power, 1.0 / power
        total += power
        out[2, n] = total
        power *= decay
        if n + 1 == span:
            out[0, span] = power
    return span


@kernel(forceinline=True)
def arrive(x, b, T, begin, act_ptr, act_idx, g_out, g_spikes):  # type: ignore[no-untyped-def]
    """``x *= `` the gradient that arrives at each of the active entries of sample b."""
    if g_spikes.shape[0] == 0:
        for e in range(x.shape[0]):
            x[e] *= g_out[np.uint64(begin + e)] if g_out.shape[0] > 0 else x.dtype.type(0)
        return
    for t in range(T):
        for e in range(act_ptr[b * T + t], act_ptr[b * T + t + 1]):
            g = g_spikes[t, b, act_idx[e]]
            if g_out.shape[0] > 0:
                g += g_out[e]
            x[e - begin] *= g


@along
@kernel(forceinline=True)
def add_rows(k, arguments):  # type: ignore[no-untyped-def]
    """``y += p W_i + q W_j``"""
    y, weight, i, p, j, q = arguments
    store(y, 0, k, fma(q, load(weight, j, k), fma(p, load(weight, i, k), load(y, 0, k))))


@kernel(part=True)
def shrink(row, factor):  # type: ignore[no-untyped-def]
    """``row *= factor``, once in many steps"""
    k, by = np.uint64(0), splat(factor)
    while k < np.uint64(row.shape[1]):
        store(row, 0, k, mul(by, load(row, 0, k)))
        k += np.uint64(LANES)


@along
@kernel(forceinline=True)
def add_row(k, arguments):  # type: ignore[no-untyped-def]
    """``out[i] += c rows[j]``"""
    out, i, c, rows, j = arguments
    store(out, i, k, fma(c, load(rows, j, k), load(out, i, k)))


@kernel(forceinline=True)
def add_events(out, indices, values, begin, end, m, factor):  # type: ignore[no-untyped-def]
    """``out[indices[e]] += factor * values[e] * m`` for the entries begin..end; no values: ones."""
    for e in range(begin, end):
        c = factor
        if values.shape[0] > 0:
            c = factor * values[np.uint64(e)]
        add_row(out.shape[1], (out, np.uint64(indices[np.uint64(e)]), splat(c), m, np.uint64(0)))


@kernel(forceinline=True)
def read(y, indices, floor, begin, end, factor, out):  # type: ignore[no-untyped-def]
    """``out[e] = factor * y[indices[e]]`` for the entries begin..end, of rows that come in descending order.

    Always READ at once: what is written below ``begin`` belongs to rows still to come, and no branch depends on how
    many entries a row has, which costs more than the entries.
    """
    while end > begin:
        if end - READ >= floor:
            for k in range(READ):
                e = np.uint64(end - 1 - k)
                out[e] = factor * y[np.uint64(0), np.uint64(indices[e])]
        else:
            for k in range(begin, end):
                out[np.uint64(k)] = factor * y[np.uint64(0), np.uint64(indices[np.uint64(k)])]
        end -= READ
