"""Convolutions of events, one sample and step after the other: its map stays in cache until what leaves is written.

Arrays of numbers have one row, (1, size): places in them are counted by the tables of ``conv_tables.py``.
"""

from __future__ import annotations

import numpy as np

from .bits import LANES
from .conv_lanes import flip
from .conv_maps import add_pooled, average, fill, maximum, rescale, unfold, unpool
from .jit import kernel
from .lanes import fma, load, splat, store, totals, zeros


@kernel(forceinline=True)
def add_run(out, to, x, at, length, value):  # type: ignore[no-untyped-def]
    """``out[to : to + length] += value * x[at : at + length]``"""
    zero, lanes = np.uint64(0), np.uint64(LANES)
    to, at = np.uint64(to), np.uint64(at)
    end, factor = at + np.uint64(length), splat(value)
    while at + np.uint64(4) * lanes <= end:
        for _ in range(4):
            store(out, zero, to, fma(load(x, zero, at), factor, load(out, zero, to)))
            to += lanes
            at += lanes
    while at + lanes <= end:
        store(out, zero, to, fma(load(x, zero, at), factor, load(out, zero, to)))
        to += lanes
        at += lanes
    while at < end:
        out[zero, to] += value * x[zero, at]
        to += np.uint64(1)
        at += np.uint64(1)


@kernel(part=True)
def add_events(indices, values, first, last, sizes, first_run, length, x, x_places, out, out_places):  # type: ignore[no-untyped-def]
    """For each event and tap add a row of x to one of out: of the weights to the map, or of the map to the weights'
    gradient. Places of either: numbers of a channel, numbers of a group, and where each run begins.
    """
    positions, inner = np.uint32(sizes[0]), np.uint32(sizes[1])
    x_channel, x_group, x_run = x_places
    out_channel, out_group, out_run = out_places
    value = out.dtype.type(1)  # a product with 1 is as fast as none
    for e in range(first, last):
        index = np.uint32(indices[e])
        channel = index // positions
        position, group = index - channel * positions, channel // inner
        if values.shape[0] > 0:
            value = values[e]
        at = np.int64(channel) * x_channel + np.int64(group) * x_group
        to = np.int64(channel) * out_channel + np.int64(group) * out_group
        for r in range(first_run[position], first_run[position + np.uint32(1)]):
            k = np.uint64(r)
            add_run(out, to + out_run[k], x, at + x_run[k], length[k], value)


@kernel(part=True)
def gradients_at(indices, first, last, sizes, runs, weight, maps, out):  # type: ignore[no-untyped-def]
    """The gradient of the input at each of a row's entries."""
    positions, inner, stride, width, _, _, sites, _ = sizes
    run_first, run_weight, run_site, run_length = runs
    zero, lanes = np.uint64(0), np.uint64(LANES)
    for e in range(first, last):
        index = np.uint32(indices[e])
        channel = index // np.uint32(positions)
        position = index - channel * np.uint32(positions)
        w = np.int64(channel) * stride
        m = np.int64(channel // np.uint32(inner)) * (sites * width)
        a, b, rest = zeros(maps), zeros(maps), maps.dtype.type(0)
        for r in range(run_first[position], run_first[position + np.uint32(1)]):
            k = np.uint64(r)
            at, to = np.uint64(w + run_weight[k]), np.uint64(m + run_site[k])
            end = at + np.uint64(run_length[k])
            while at + lanes + lanes <= end:
                a = fma(load(weight, zero, at), load(maps, zero, to), a)
                b = fma(load(weight, zero, at + lanes), load(maps, zero, to + lanes), b)
                at += lanes + lanes
                to += lanes + lanes
            if at + lanes <= end:
                a = fma(load(weight, zero, at), load(maps, zero, to), a)
                at += lanes
                to += lanes
            while at < end:
                rest += weight[zero, at] * maps[zero, to]
                at += np.uint64(1)
                to += np.uint64(1)
        p, q, _, _ = totals(a, b, a, b)
        out[e] = p + q + rest


@kernel()
def convolve(
    samples, events, sizes, runs, windows, is_max, weight, bias, factors, out, winners, maps, pooled
):  # type: ignore[no-untyped-def]
    """Rows b * T + t from first to last; ``out`` and ``winners`` have a row for each t * B + b."""
    first_row, last_row, T, B = samples
    indptr, indices, values = events
    _, _, stride, width, channels, groups, sites, left = sizes
    first_run, run_weight, run_site, length = runs
    in_weight, in_map = (stride, 0, run_weight), (0, sites * width, run_site)
    has_windows = windows[0].shape[0] > 0
    for r in range(first_row, last_row):
        row = r % T * B + r // T
        fill(maps, bias, sizes)
        some = indices, values, indptr[r], indptr[r + 1]
        add_events(*some, sizes, first_run, length, weight, in_weight, maps, in_map)
        if factors.shape[1] > 0:
            rescale(maps, factors, sizes)
        if has_windows:
            if is_max:
                maximum(maps, sizes, windows, pooled, winners, row)
            else:
                average(maps, sizes, windows, pooled)
        for g in range(groups):
            to = (row * groups + g) * channels * left
            flip(pooled, g * left * width, left, width, channels, out, to, left)


@kernel()
def convolve_backward(  # type: ignore[no-untyped-def]
    samples,
    events,
    active,
    sizes,
    runs,
    windows,
    weight,
    nu,
    winners,
    g_weight,
    g_bias,
    g_active,
    maps,
    pooled,
):
    """Rows b * T + t from first to last of the gradients; those that are not wanted are empty."""
    first_row, last_row, T, B = samples
    indptr, indices, values = events
    act_ptr, act_idx = active
    stride, width, sites = sizes[2], sizes[3], sizes[6]
    first_run, run_weight, run_site, length = runs
    in_weight, in_map = (stride, 0, run_weight), (0, sites * width, run_site)
    has_windows = windows[0].shape[0] > 0
    for r in range(first_row, last_row):
        wanted = g_bias.shape[1] > 0
        wanted |= g_weight.shape[1] > 0 and indptr[r] < indptr[r + 1]
        wanted |= g_active.shape[0] > 0 and act_ptr[r] < act_ptr[r + 1]
        if not wanted:
            continue
        row = r % T * B + r // T
        unfold(nu, row, sizes, pooled)
        if g_bias.shape[1] > 0:
            add_pooled(g_bias, pooled, sizes, windows, has_windows, winners.shape[1] > 0)
        if has_windows:
            unpool(pooled, sizes, windows, winners, row, maps)
        if g_weight.shape[1] > 0:
            some = indices, values, indptr[r], indptr[r + 1]
            add_events(*some, sizes, first_run, length, maps, in_map, g_weight, in_weight)
        if g_active.shape[0] > 0:
            gradients_at(act_idx, act_ptr[r], act_ptr[r + 1], sizes, runs, weight, maps, g_active)


@kernel()
def unpool_rows(first, last, sizes, windows, nu, winners, out, pooled):  # type: ignore[no-untyped-def]
    """Rows of ``nu`` as maps with channels last."""
    for row in range(first, last):
        unfold(nu, row, sizes, pooled)
        k = row - first
        unpool(pooled, sizes, windows, winners, row, out[k : k + 1])
