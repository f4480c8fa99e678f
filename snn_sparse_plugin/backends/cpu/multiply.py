"""A product of a chunk of rows with a matrix inside a kernel, for gradients that are used as soon as they are made."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .bits import LANES
from .jit import kernel
from .lanes import fma, load, mul, splat, store, zeros
from .layout import aligned, rows_of


def panels_of(weight: Tensor, dtype: np.dtype) -> np.ndarray:
    """(panels · K, 16): the columns of a (K, M) matrix, sixteen at a time, one below the other.

    A panel is read for each tile of rows. Apart from each other its rows would push one another out of the cache, which
    takes half of the speed from 512 columns on.
    """
    rows = rows_of(weight, dtype)
    count, width = rows.shape
    out = aligned(count * width // LANES, LANES, dtype)
    out.reshape(width // LANES, count, LANES)[:] = rows.reshape(count, -1, LANES).transpose(1, 0, 2)
    return out


@kernel(forceinline=True)
def _four(nu, panels, panel, t, last, b, block, to, by, column):  # type: ignore[no-untyped-def]
    """The steps t..t + 4 of one panel; those beyond the last are the last one again."""
    p, q = np.uint64(t), np.uint64(min(t + 1, last))
    r, s = np.uint64(min(t + 2, last)), np.uint64(min(t + 3, last))
    c, d, e, f = zeros(block), zeros(block), zeros(block), zeros(block)
    for i in range(nu.shape[2]):
        k = np.uint64(i)
        of = load(panels, panel + k, np.uint64(0))
        c, d = fma(splat(nu[p, b, k]), of, c), fma(splat(nu[q, b, k]), of, d)
        e, f = fma(splat(nu[r, b, k]), of, e), fma(splat(nu[s, b, k]), of, f)
    store(block, p + to, column, mul(load(block, p + by, column), c))
    store(block, q + to, column, mul(load(block, q + by, column), d))
    store(block, r + to, column, mul(load(block, r + by, column), e))
    store(block, s + to, column, mul(load(block, s + by, column), f))


@kernel(forceinline=True)
def _six(nu, panels, panel, t, b, block, to, by, column):  # type: ignore[no-untyped-def]
    """The steps t..t + 6 of one panel."""
    p = np.uint64(t)
    q, r, s, u, v = (
        p + np.uint64(1),
        p + np.uint64(2),
        p + np.uint64(3),
        p + np.uint64(4),
        p + np.uint64(5),
    )
    c, d, e = zeros(block), zeros(block), zeros(block)
    f, g, h = zeros(block), zeros(block), zeros(block)
    for i in range(nu.shape[2]):
        k = np.uint64(i)
        of = load(panels, panel + k, np.uint64(0))
        c, d = fma(splat(nu[p, b, k]), of, c), fma(splat(nu[q, b, k]), of, d)
        e, f = fma(splat(nu[r, b, k]), of, e), fma(splat(nu[s, b, k]), of, f)
        g, h = fma(splat(nu[u, b, k]), of, g), fma(splat(nu[v, b, k]), of, h)
    store(block, p + to, column, mul(load(block, p + by, column), c))
    store(block, q + to, column, mul(load(block, q + by, column), d))
    store(block, r + to, column, mul(load(block, r + by, column), e))
    store(block, s + to, column, mul(load(block, s + by, column), f))
    store(block, u + to, column, mul(load(block, u + by, column), g))
    store(block, v + to, column, mul(load(block, v + by, column), h))


@kernel(part=True)
def multiply(nu, panels, start, stop, b, block, row, factor):  # type: ignore[no-untyped-def]
    """``block[row + t - start] = block[factor + t - start] * (nu[t, b] @ weight)`` for the steps start..stop."""
    b, to, by = np.uint64(b), np.uint64(row) - np.uint64(start), np.uint64(factor) - np.uint64(start)
    column, panel = np.uint64(0), np.uint64(0)
    while column < np.uint64(block.shape[1]):
        t = start
        while t < stop:
            # six rows with 16 columns fill AVX2's registers and keep its multipliers busy; eight are four and four
            if stop - t >= 6 and stop - t != 8:
                _six(nu, panels, panel, t, b, block, to, by, column)
                t += 6
            else:
                _four(nu, panels, panel, t, stop - 1, b, block, to, by, column)
                t += 4
        column += np.uint64(LANES)
        panel += np.uint64(nu.shape[2])
