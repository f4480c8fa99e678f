"""Where a convolution's events go: tables that are made once for each geometry.

Maps of one sample and step are channels-last, (groups, sites, width): the output channels of a group at a site stand
in a row. The weights of an input channel are rows too, (taps, width), in an order in which the taps that reach
neighbouring sites of one line of the map are neighbours. So an event adds a few runs of memory to as many runs, and no
kernel tests for a border: an event near it has shorter runs.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ...core.convolution import Convolution
from .bits import LANES
from .memory import array

MAX_BYTE = 255


class Runs(NamedTuple):
    """For each position of the input its runs ``first[p] … first[p + 1]``, counted in numbers, not in rows."""

    first: np.ndarray
    weight: np.ndarray  # where a run begins in the weights of an input channel
    site: np.ndarray  # where in the map of a group
    length: np.ndarray


class Windows(NamedTuple):
    """For each site that a pool leaves the places it reads in the map of a group, ``first[o] … first[o + 1]``."""

    first: np.ndarray
    site: np.ndarray
    divisor: np.ndarray  # of an average


class Tables(NamedTuple):
    """A convolution's geometry for kernels.

    ``sizes``: positions of the input, its channels in a group, numbers of weights of a channel, width, output channels
    in a group, groups, sites of the map, sites that leave.
    """

    sizes: tuple[int, ...]
    runs: Runs
    windows: Windows
    order: np.ndarray  # the taps as the rows of weights hold them


def width_of(channels: int) -> int:
    """Numbers in a row of this many channels: whole vectors, except where three quarters would be empty."""
    return channels if channels <= LANES // 4 else -(-channels // LANES) * LANES


@lru_cache(maxsize=64)
def tables(conv: Convolution) -> Tables:
    channels = conv.out_channels // conv.groups
    width, positions = width_of(channels), math.prod(conv.size)
    order, runs = _runs(conv, width)
    sites, left = math.prod(conv.map_size), math.prod(conv.out_size)
    inner = conv.in_channels // conv.groups
    sizes = (positions, inner, len(order) * width, width, channels, conv.groups, sites, left)
    return Tables(sizes, runs, windows(conv, width), order)


def _runs(conv: Convolution, width: int) -> tuple[np.ndarray, Runs]:
    dims = tuple(
        zip(conv.size, conv.map_size, conv.kernel, conv.stride, conv.padding, conv.dilation, strict=True)
    )
    # along a line, site = (x + padding - dilation * tap) / stride: from one tap that divides to the next that many
    # sites fewer, and with taps counted downwards within their remainder the sites rise
    _, _, kernel, stride, _, dilation = dims[-1]
    step = dilation // math.gcd(dilation, stride)
    every = stride // math.gcd(dilation, stride)
    last = [tap for start in range(every) for tap in reversed(range(start, kernel, every))]
    place = {tap: k for k, tap in enumerate(last)}
    lines = math.prod(conv.kernel[:-1])
    order = np.array([line * kernel + tap for line in range(lines) for tap in last])

    reached = [[_reached(n, *dim[1:]) for n in range(dim[0])] for dim in dims]
    first, runs = [0], []
    for position in product(*reached):
        for pairs in product(*position[:-1]):
            tap = site = 0
            for (k, o), dim in zip(pairs, dims, strict=False):
                tap, site = tap * dim[2] + k, site * dim[1] + o
            begin, row = tap * kernel, site * dims[-1][1]
            rows = sorted((place[k], o) for k, o in position[-1])
            joined: list[list[int]] = []
            for at, o in rows:
                if (
                    joined
                    and step == 1
                    and joined[-1][0] + joined[-1][2] == at
                    and joined[-1][1] + joined[-1][2] == o
                ):
                    joined[-1][2] += 1
                else:
                    joined.append([at, o, 1])
            runs += [(begin + at, row + o, n) for at, o, n in joined]
        first.append(len(runs))
    found = np.array(runs, np.int32).reshape(-1, 3) * np.int32(width)
    return order, Runs(np.array(first, np.int32), *(np.ascontiguousarray(column) for column in found.T))


def _reached(
    n: int, out: int, kernel: int, stride: int, padding: int, dilation: int
) -> list[tuple[int, int]]:
    """The taps, and the sites they reach, of position ``n`` of one dimension."""
    reached = ((k, n + padding - dilation * k) for k in range(kernel))
    return [(k, at // stride) for k, at in reached if at % stride == 0 and 0 <= at // stride < out]


def windows(conv: Convolution, width: int) -> Windows:
    pool, size = conv.pool, conv.map_size
    if pool is None:
        none = np.empty(0, np.int32)
        return Windows(none, none, np.empty(0))
    dims = list(
        zip(size, pool.kernel, pool.stride, pool.padding, pool.dilation or (1,) * len(size), strict=True)
    )
    first, sites, divisors = [0], [], []
    for out in product(*(range(n) for n in conv.out_size)):
        starts = [o * stride - padding for o, (_, _, stride, padding, _) in zip(out, dims, strict=True)]
        inside = [
            [at for k in range(kernel) if 0 <= (at := start + k * dilation) < n]
            for start, (n, kernel, _, _, dilation) in zip(starts, dims, strict=True)
        ]
        counted = math.prod(  # with the padding, but not beyond it
            min(start + kernel, n + padding) - start
            for start, (n, kernel, _, padding, _) in zip(starts, dims, strict=True)
        )
        sites += [int(np.ravel_multi_index(at, size)) * width for at in product(*inside)]
        divisors.append(
            pool.divisor_override or (counted if pool.count_include_pad else len(sites) - first[-1])
        )
        first.append(len(sites))
    return Windows(np.array(first, np.int32), np.array(sites, np.int32), np.array(divisors, float))


def rows_of_weight(conv: Convolution, weight: Tensor, flat: np.ndarray) -> np.ndarray:
    """Write the weights (C', C / groups, *kernel) into rows (1, C · taps · width) for each input channel."""
    _, inner, _, width, channels, groups, *_ = tables(conv).sizes
    order = tables(conv).order
    rows = flat.reshape(groups, inner, len(order), width)
    rows[..., channels:] = 0
    rows[..., :channels] = (
        array(weight).reshape(groups, channels, inner, -1)[..., order].transpose(0, 2, 3, 1)
    )
    return flat


def weight_of_rows(conv: Convolution, flat: np.ndarray) -> np.ndarray:
    """A gradient (C', C / groups, *kernel) of the one of rows."""
    _, inner, _, width, channels, groups, *_ = tables(conv).sizes
    order = tables(conv).order
    out = np.empty((groups, channels, inner, len(order)), flat.dtype)
    out[..., order] = flat.reshape(groups, inner, len(order), width)[..., :channels].transpose(0, 3, 1, 2)
    return out.reshape(conv.out_channels, inner, *conv.kernel)
