"""What is done to the map of one sample and step while it is in cache: bias, scale, pools and their gradients.

Arrays of numbers have one row, (1, size), with the channels last.
"""

from __future__ import annotations

import numpy as np

from .bits import LANES
from .conv_lanes import flip, if_larger, store_places, where_placed
from .jit import kernel
from .lanes import add, div, fma, load, splat, store, zeros


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
def rescale(maps, factors, sizes):  # type: ignore[no-untyped-def]
    """``maps * factors[0] + factors[1]`` at every site, rounded once, as torch's batch norm is where a machine can."""
    width, groups, sites = sizes[3], sizes[5], sizes[6]
    zero, one, lanes, place = np.uint64(0), np.uint64(1), np.uint64(LANES), np.uint64(0)
    for g in range(groups):
        begin = np.uint64(g * width)
        end = begin + np.uint64(width)
        for _ in range(sites):
            j = begin
            while j + lanes <= end:
                scaled = fma(load(maps, zero, place), load(factors, zero, j), load(factors, one, j))
                store(maps, zero, place, scaled)
                j += lanes
                place += lanes
            while j < end:
                maps[zero, place] = fma(maps[zero, place], factors[zero, j], factors[one, j])
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
    zero, lanes = np.uint64(0), np.uint64(LANES)
    for g in range(groups):
        base = g * sites * width
        for o in range(left):
            to, by = np.uint64((g * left + o) * width), maps.dtype.type(divisor[o])
            if first[o] == first[o + 1]:
                by = maps.dtype.type(1)
            j = zero
            while j + lanes <= np.uint64(width):
                sums = zeros(maps)
                for k in range(first[o], first[o + 1]):
                    sums = add(sums, load(maps, zero, np.uint64(base + site[k]) + j))
                store(out, zero, to + j, div(sums, splat(by)))
                j += lanes
            while j < np.uint64(width):
                total = maps.dtype.type(0)
                for k in range(first[o], first[o + 1]):
                    total += maps[zero, np.uint64(base + site[k]) + j]
                out[zero, to + j] = total / by
                j += np.uint64(1)


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
                while j + lanes <= np.uint64(width):
                    x = load(pooled, zero, at + j)
                    mine = where_placed(winners, row, at + j, turn, x) if is_max else div(x, splat(by))
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


@kernel(part=True)
def unfold(nu, row, sizes, pooled):  # type: ignore[no-untyped-def]
    """A row of ``nu`` with its channels last."""
    _, _, _, width, channels, groups, _, left = sizes
    for g in range(groups):
        at = (row * groups + g) * channels * left
        flip(nu, at, channels, left, left, pooled, g * left * width, width)
