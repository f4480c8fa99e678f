"""Convolutions of events, one sample and step after the other: its map stays in cache until what leaves is written.

Arrays of numbers have one row, (1, size): places in them are counted by the tables of ``conv_tables.py``.
"""

from __future__ import annotations

import numpy as np

from .bits import LANES
from .conv_lanes import flip, if_larger, store_places, where_placed
from .jit import kernel
from .lanes import add, fma, load, splat, store, totals, zeros


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


@kernel(part=True)
def fill(maps, bias, sizes):  # type: ignore[no-untyped-def]
    """The bias (1, groups · width) at every site."""
    width, groups, sites = sizes[3], sizes[5], sizes[6]
    zero, lanes, place = np.uint64(0), np.uint64(LANES), np.uint64(0)
    for g in range(groups):
        begin = np.uint64(g * width)
        end = begin + np.uint64(width)
        for _ in range(sites):
            j = begin
            while j + lanes <= end:
                store(maps, zero, place, load(bias, zero, j))
                j += lanes
                place += lanes
            while j < end:
                maps[zero, place] = bias[zero, j]
                j += np.uint64(1)
                place += np.uint64(1)


@kernel(part=True)
def maximum(maps, sizes, windows, out, winners, row):  # type: ignore[no-untyped-def]
    """The largest of each window as torch finds it: the first of equal ones, and the last NaN.

    ``winners[row]``, unless it is empty: which of the window's places it was.
    """
    width, groups, sites, left = sizes[3], sizes[5], sizes[6], sizes[7]
    first, site, _ = windows
    keep, zero, lanes = winners.shape[1] > 0, np.uint64(0), np.uint64(LANES)
    row = np.uint64(row)
    for g in range(groups):
        base = g * sites * width
        for o in range(left):
            begin, end = first[o], first[o + 1]
            to = np.uint64((g * left + o) * width)
            if begin == end:
                for c in range(np.uint64(width)):
                    out[zero, to + c] = -np.inf
                continue
            j = zero
            while j + lanes <= np.uint64(width):
                best, which = load(maps, zero, np.uint64(base + site[begin]) + j), splat(np.int32(0))
                for k in range(begin + 1, end):
                    x = load(maps, zero, np.uint64(base + site[k]) + j)
                    which = if_larger(x, best, splat(np.int32(k - begin)), which)
                    best = if_larger(x, best, x, best)
                store(out, zero, to + j, best)
                if keep:
                    store_places(winners, row, to + j, which)
                j += lanes
            while j < np.uint64(width):
                top, turn = maps[zero, np.uint64(base + site[begin]) + j], begin
                for k in range(begin + 1, end):
                    one = maps[zero, np.uint64(base + site[k]) + j]
                    if one > top or one != one:
                        top, turn = one, k
                out[zero, to + j] = top
                if keep:
                    winners[row, to + j] = turn - begin
                j += np.uint64(1)


@kernel(part=True)
def average(maps, sizes, windows, out):  # type: ignore[no-untyped-def]
    """The mean of each window; of an empty one 0."""
    width, groups, sites, left = sizes[3], sizes[5], sizes[6], sizes[7]
    first, site, divisor = windows
    zero = np.uint64(0)
    for g in range(groups):
        base = g * sites * width
        for o in range(left):
            to, by = np.uint64((g * left + o) * width), maps.dtype.type(divisor[o])
            for j in range(np.uint64(width)):
                total = maps.dtype.type(0)
                for k in range(first[o], first[o + 1]):
                    total += maps[zero, np.uint64(base + site[k]) + j]
                out[zero, to + j] = total / by if first[o] < first[o + 1] else total


@kernel(part=True)
def unpool(pooled, sizes, windows, winners, row, maps):  # type: ignore[no-untyped-def]
    """The gradient of the map from that of what the pool left; of a maximum where ``winners`` is not empty."""
    width, groups, sites, left = sizes[3], sizes[5], sizes[6], sizes[7]
    first, site, divisor = windows
    is_max, zero, lanes = winners.shape[1] > 0, np.uint64(0), np.uint64(LANES)
    row = np.uint64(row)
    for c in range(np.uint64(groups * sites * width)):
        maps[zero, c] = 0
    for g in range(groups):
        base = g * sites * width
        for o in range(left):
            begin, at = first[o], np.uint64((g * left + o) * width)
            by = maps.dtype.type(1 if is_max else divisor[o])
            for k in range(begin, first[o + 1]):
                to, turn, j = np.uint64(base + site[k]), np.int32(k - begin), zero
                if is_max:
                    while j + lanes <= np.uint64(width):
                        mine = where_placed(winners, row, at + j, turn, load(pooled, zero, at + j))
                        store(maps, zero, to + j, add(load(maps, zero, to + j), mine))
                        j += lanes
                while j < np.uint64(width):
                    if not is_max or winners[row, at + j] == turn:
                        maps[zero, to + j] += pooled[zero, at + j] / by
                    j += np.uint64(1)


@kernel(part=True)
def add_pooled(g_bias, pooled, sizes, windows, has_windows, is_max):  # type: ignore[no-untyped-def]
    """The gradient of the bias (1, groups · width)."""
    width, groups, left = sizes[3], sizes[5], sizes[7]
    first, _, divisor = windows
    for g in range(groups):
        begin = np.uint64(g * width)
        for o in range(left):
            share = pooled.dtype.type(1)
            if has_windows:
                count = first[o + 1] - first[o]
                share = pooled.dtype.type(min(count, 1) if is_max else count / divisor[o])
            place = np.uint64((g * left + o) * width)
            for j in range(np.uint64(width)):
                g_bias[np.uint64(0), begin + j] += pooled[np.uint64(0), place + j] * share


@kernel()
def convolve(samples, events, sizes, runs, windows, is_max, weight, bias, out, winners, maps, pooled):  # type: ignore[no-untyped-def]
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
        if has_windows:
            if is_max:
                maximum(maps, sizes, windows, pooled, winners, row)
            else:
                average(maps, sizes, windows, pooled)
        for g in range(groups):
            to = (row * groups + g) * channels * left
            flip(pooled, g * left * width, left, width, channels, out, to, left)


@kernel(part=True)
def unfold(nu, row, sizes, pooled):  # type: ignore[no-untyped-def]
    """A row of ``nu`` with its channels last."""
    _, _, _, width, channels, groups, _, left = sizes
    for g in range(groups):
        at = (row * groups + g) * channels * left
        flip(nu, at, channels, left, left, pooled, g * left * width, width)


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
