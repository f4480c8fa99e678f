"""The gradient of a convolution's input behind a max-pool: as in the forward, a row for each number that is not zero.

A maximum passes its gradient to one place of the map, so three in four of a map's numbers are zero behind a pool of
2 x 2, and more where neurons are not active. What a product over the whole map would do with zeros is left out: each
number adds a run of input channels for each line of the kernel.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from ...core.convolution import Convolution
from .conv_kernels import add_run
from .conv_lanes import flip
from .conv_tables import Runs, Tables, width_of
from .jit import kernel
from .layout import aligned
from .memory import array
from .threads import parallel, split

SPARSE_FROM = 4
"""Places of a window from which this is faster than torch's product over the whole map. Measured on a core of an AMD
EPYC, four places: 2.0 times for 12 -> 64 channels of 5 x 5, 1.6 for 64 -> 128 and 1.4 for 128 -> 256 of 3 x 3; one
place (no pool): 0.4 times."""


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

    def run(first: int, last: int) -> None:
        maps = aligned(1, conv.groups * positions * width, nu.dtype)
        spread_gradients(first, last, sizes, _runs(conv), found.windows, laid, nu, winners, maps, array(out))

    if rows:
        parallel([lambda r=r: run(*r) for r in split(rows)])  # type: ignore[misc]
    return out


@kernel()
def spread_gradients(first, last, sizes, runs, windows, weight, nu, winners, maps, out):  # type: ignore[no-untyped-def]
    """Rows from first to last. A channel's weights serve all its sites before the next one's."""
    out_width, channels, groups, left, positions, inner, width, taps = sizes
    run_first, run_weight, run_site, run_length = runs
    window_first, window_site, _ = windows
    result = out.reshape((1, out.size))
    for row in range(first, last):
        maps[:] = 0
        for c in range(groups * channels):
            g = c // channels
            base, w = g * positions * width, c * taps * width
            place = g * left * out_width + c - g * channels
            for o in range(left):
                value = nu[row, c * left + o]
                if value == 0:
                    continue
                site = o
                if window_first.shape[0] > 0:
                    begin = window_first[o]
                    if begin == window_first[o + 1]:
                        continue
                    site = window_site[begin + winners[row, place + o * out_width]] // out_width
                for k in range(run_first[site], run_first[site + 1]):
                    add_run(maps, base + run_site[k], weight, w + run_weight[k], run_length[k], value)
        for g in range(groups):
            to = row * out.shape[1] + g * inner * positions
            flip(maps, g * positions * width, positions, width, inner, result, to, positions)
