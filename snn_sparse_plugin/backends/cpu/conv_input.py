"""The gradient of a convolution's input behind a max-pool: as in the forward, a row for each number that is not zero.

A maximum passes its gradient to one place of the map, so three in four of a map's numbers are zero behind a pool of
2 x 2, and more where neurons are not active. What a product over the whole map would do with zeros is left out: each
number adds a run of input channels for each line of the kernel, the channels of one place together, in registers.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from ...core.convolution import Convolution
from .bits import LANES
from .conv_lanes import flip
from .conv_tables import Runs, Tables, width_of
from .jit import kernel
from .lanes import add, fma, load, splat, store, zeros
from .layout import aligned
from .memory import array
from .threads import parallel, split

SPARSE_FROM = 4
"""Places of a window from which this is faster than torch's product over the whole map. Measured on a core of an AMD
EPYC, four places: 2.6 times for 12 -> 64 channels of 5 x 5, 2.4 for 64 -> 128 and 1.7 for 128 -> 256 of 3 x 3."""


def is_sparse(conv: Convolution) -> bool:
    """Whether so many numbers of a map have no gradient that the others are added one by one."""
    return conv.pool is not None and conv.pool.kind == "max" and math.prod(conv.pool.kernel) >= SPARSE_FROM


@lru_cache(maxsize=64)
def _runs(conv: Convolution) -> Runs:
    """For each site of the map the positions of the input that it reads: runs of a line, one row of channels each."""
    width = width_of(conv.in_channels // conv.groups)
    dims = tuple(
        zip(conv.map_size, conv.size, conv.kernel, conv.stride, conv.padding, conv.dilation, strict=True)
    )
    read = [
        [
            [(k, at) for k in range(kernel) if 0 <= (at := o * stride - padding + k * dilation) < n]
            for o in range(out)
        ]
        for out, n, kernel, stride, padding, dilation in dims
    ]
    last = len(dims) - 1
    together = dims[-1][5] == 1  # neighbouring taps read neighbouring positions
    first, runs = [0], []
    for site in product(*read):
        for pairs in product(*site[:-1]):
            tap = line = 0
            for (k, at), dim in zip(pairs, dims[:last], strict=True):
                tap, line = tap * dim[2] + k, line * dim[1] + at
            taps = site[-1]
            joined = (
                [(taps[0][0], taps[0][1], len(taps))] if together and taps else [(k, at, 1) for k, at in taps]
            )
            runs += [(tap * dims[-1][2] + k, line * dims[-1][1] + at, n) for k, at, n in joined]
        first.append(len(runs))
    found = np.array(runs, np.int32).reshape(-1, 3) * np.int32(width)
    return Runs(np.array(first, np.int32), *(np.ascontiguousarray(column) for column in found.T))


def input_grad(
    conv: Convolution, found: Tables, weight: Tensor, nu: np.ndarray, winners: np.ndarray
) -> Tensor:
    """(rows, in_features) of ``nu`` (rows, out_features)."""
    width, rows = width_of(conv.in_channels // conv.groups), len(nu)
    out = torch.empty(rows, conv.in_features, dtype=weight.dtype)
    taps = math.prod(conv.kernel)
    laid = aligned(1, conv.out_channels * taps * width, nu.dtype)
    by_channel = laid.reshape(conv.out_channels, taps, width)
    inner = conv.in_channels // conv.groups
    by_channel[..., inner:] = 0
    by_channel[..., :inner] = array(weight).reshape(conv.out_channels, inner, taps).transpose(0, 2, 1)
    positions = math.prod(conv.size)
    sizes = found.sizes[3], found.sizes[4], conv.groups, found.sizes[7], positions, inner, width, taps

    runs, windows = _runs(conv), found.windows
    places, lines = (int(np.diff(table.first).max(initial=0)) for table in (windows, runs))
    n = conv.groups * found.sizes[7] * places

    def run(first: int, last: int) -> None:
        maps = aligned(1, conv.groups * positions * width, nu.dtype)
        each = n * found.sizes[4]
        lists = np.empty(n, np.uint32), np.empty(each, np.uint64), np.empty(each, nu.dtype)
        most = places, lines
        spread_gradients(first, last, sizes, most, runs, windows, laid, nu, winners, lists, maps, array(out))

    if rows:
        parallel([lambda r=r: run(*r) for r in split(rows)])  # type: ignore[misc]
    return out


@kernel(part=True)
def sort_by_site(row, sizes, places, windows, nu, winners, lists):  # type: ignore[no-untyped-def]
    """The gradients of a row that are not zero in lists, one for each place of each window: how many there are, where
    the weights of each one's channel begin, and the gradient."""
    out_width, channels, groups, left, _, _, width, taps = sizes
    window_first, _, _ = windows
    count, offset, value = lists
    count[:] = 0
    each, step = np.uint64(channels), np.uint64(taps * width)
    slot, group = np.uint64(0), np.uint64(0)
    for g in range(groups):
        for o in range(left):
            if window_first[o] < window_first[o + 1]:  # else it has no winner
                at, winner, w = (
                    np.uint64(g * channels * left + o),
                    np.uint64((g * left + o) * out_width),
                    group,
                )
                for _ in range(channels):
                    x = nu[row, at]
                    k = slot + np.uint64(winners[row, winner])
                    n = np.uint64(count[k])
                    offset[k * each + n], value[k * each + n] = w, x
                    count[k] = n + np.uint64(x != 0)  # a zero is written over
                    at += np.uint64(left)
                    winner += np.uint64(1)
                    w += step
            slot += np.uint64(places)
        group += each * step


@kernel(forceinline=True)
def add_rows(out, to, length, x, at, offset, value, first, last):  # type: ignore[no-untyped-def]
    """``out[to : to + length]`` plus the rows of x at ``at + offset[i]`` times ``value[i]``, for i from first to last:
    summed in registers."""
    zero, lanes, single = np.uint64(0), np.uint64(LANES), np.uint64(1)
    to, end, at = np.uint64(to), np.uint64(to) + np.uint64(length), np.uint64(at)
    first, last = np.uint64(first), np.uint64(last)
    one, two, three = lanes, lanes + lanes, lanes + lanes + lanes
    while to + np.uint64(4) * lanes <= end:
        a, b = load(out, zero, to), load(out, zero, to + one)
        c, d = load(out, zero, to + two), load(out, zero, to + three)
        for i in range(first, last):
            w, factor = at + offset[i], splat(value[i])
            a = fma(load(x, zero, w), factor, a)
            b = fma(load(x, zero, w + one), factor, b)
            c = fma(load(x, zero, w + two), factor, c)
            d = fma(load(x, zero, w + three), factor, d)
        store(out, zero, to, a)
        store(out, zero, to + one, b)
        store(out, zero, to + two, c)
        store(out, zero, to + three, d)
        to += np.uint64(4) * lanes
        at += np.uint64(4) * lanes
    while to + lanes <= end:
        a, b, i = load(out, zero, to), zeros(out), first  # two sums, as each waits for the one before
        while i + single < last:
            a = fma(load(x, zero, at + offset[i]), splat(value[i]), a)
            b = fma(load(x, zero, at + offset[i + single]), splat(value[i + single]), b)
            i += np.uint64(2)
        if i < last:
            a = fma(load(x, zero, at + offset[i]), splat(value[i]), a)
        store(out, zero, to, add(a, b))
        to += lanes
        at += lanes
    while to < end:
        for i in range(first, last):
            out[zero, to] += value[i] * x[zero, at + offset[i]]
        to += single
        at += single


@kernel()
def spread_gradients(first, last, sizes, most, runs, windows, weight, nu, winners, lists, maps, out):  # type: ignore[no-untyped-def]
    """Rows from first to last. One line of the kernel after the other, so that the weights of all channels in it stay
    in cache. ``most``: places of a window, lines of a site."""
    out_width, channels, groups, left, positions, inner, width, _ = sizes
    run_first, run_weight, run_site, run_length = runs
    window_first, window_site, _ = windows
    count, offset, value = lists
    places, lines = most
    result = out.reshape((1, out.size))
    for row in range(first, last):
        maps[:] = 0
        sort_by_site(np.uint64(row), sizes, places, windows, nu, winners, lists)
        for line in range(lines):
            for g in range(groups):
                base = g * positions * width
                for o in range(left):
                    begin, slot = window_first[o], (g * left + o) * places
                    for p in range(window_first[o + 1] - begin):
                        n = count[slot + p]
                        site = window_site[begin + p] // out_width
                        k = run_first[site] + line
                        if n > 0 and k < run_first[site + 1]:
                            to, i = base + run_site[k], (slot + p) * channels
                            add_rows(maps, to, run_length[k], weight, run_weight[k], offset, value, i, i + n)
        for g in range(groups):
            to = row * out.shape[1] + g * inner * positions
            flip(maps, g * positions * width, positions, width, inner, result, to, positions)
