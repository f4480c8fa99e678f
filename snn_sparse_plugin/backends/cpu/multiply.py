"""A product of a chunk of rows with a matrix inside a kernel, for gradients that are used as soon as they are made."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from .bits import LANES
from .jit import kernel
from .lanes import fma, load, mul, splat, store, zeros
from .layout import aligned, padded
from .memory import array


def panels_of(weight: Tensor, dtype: np.dtype) -> np.ndarray:
    """(panels · K, 16): the columns of a (K, M) matrix, sixteen at a time, one below the other; zeros beyond the last.

    A panel is read for each tile of rows. Apart from each other its rows would push one another out of the cache, which
    takes half of the speed from 512 columns on.
    """
    count, columns = weight.shape
    out = aligned(count * padded(columns) // LANES, LANES, dtype)
    _fill_panels(array(weight), out)
    return out


@kernel()
def _fill_panels(weight, out):  # type: ignore[no-untyped-def]
    count, columns = weight.shape
    for column in range(0, columns, LANES):
        first = np.uint64(column // LANES * count)
        if column + LANES <= columns:
            for row in range(count):
                k = np.uint64(row)
                store(out, first + k, np.uint64(0), load(weight, k, np.uint64(column)))
        else:
            for row in range(count):
                k = np.uint64(row)
                for j in range(LANES):
                    out[first + k, j] = weight[k, column + j] if column + j < columns else 0


@kernel(forceinline=True)
def _put(block, row, to, by, column, x):  # type: ignore[no-untyped-def]
    store(block, row + to, column, mul(load(block, row + by, column), x))


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
    for row, x in ((p, c), (q, d), (r, e), (s, f)):
        _put(block, row, to, by, column, x)


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
    for row, x in ((p, c), (q, d), (r, e), (s, f), (u, g), (v, h)):
        _put(block, row, to, by, column, x)


@kernel(forceinline=True)
def _six_of_two(nu, panels, panel, t, last, b, block, to, by, column):  # type: ignore[no-untyped-def]
    """The steps t..t + 6 of two panels; those beyond the last are the last one again."""
    p, q = np.uint64(t), np.uint64(min(t + 1, last))
    r, s = np.uint64(min(t + 2, last)), np.uint64(min(t + 3, last))
    u, v = np.uint64(min(t + 4, last)), np.uint64(min(t + 5, last))
    c, d, e = zeros(block), zeros(block), zeros(block)
    f, g, h = zeros(block), zeros(block), zeros(block)
    c2, d2, e2 = zeros(block), zeros(block), zeros(block)
    f2, g2, h2 = zeros(block), zeros(block), zeros(block)
    for i in range(nu.shape[2]):
        k = np.uint64(i)
        of = load(panels, panel + k, np.uint64(0))
        of2 = load(panels, panel + np.uint64(nu.shape[2]) + k, np.uint64(0))
        x, y = splat(nu[p, b, k]), splat(nu[q, b, k])
        c, c2, d, d2 = fma(x, of, c), fma(x, of2, c2), fma(y, of, d), fma(y, of2, d2)
        x, y = splat(nu[r, b, k]), splat(nu[s, b, k])
        e, e2, f, f2 = fma(x, of, e), fma(x, of2, e2), fma(y, of, f), fma(y, of2, f2)
        x, y = splat(nu[u, b, k]), splat(nu[v, b, k])
        g, g2, h, h2 = fma(x, of, g), fma(x, of2, g2), fma(y, of, h), fma(y, of2, h2)
    for row, x, y in ((p, c, c2), (q, d, d2), (r, e, e2), (s, f, f2), (u, g, g2), (v, h, h2)):
        _put(block, row, to, by, column, x)
        _put(block, row, to, by, column + np.uint64(LANES), y)


@cache
def multiply_kernel(by_two: bool) -> Callable[..., Any]:
    """``multiply(nu, panels, start, stop, b, block, row, factor)``: ``block[row + t - start] = block[factor + t -
    start] * (nu[t, b] @ weight)`` for the steps start..stop.

    ``by_two``: two panels at a time. Their twelve vectors of sums keep both multipliers of AVX-512 busy, which six do
    not; AVX2 has registers for six.
    """

    @kernel(part=True)
    def multiply(nu, panels, start, stop, b, block, row, factor):  # type: ignore[no-untyped-def]
        b, to, by = np.uint64(b), np.uint64(row) - np.uint64(start), np.uint64(factor) - np.uint64(start)
        column, panel, width = np.uint64(0), np.uint64(0), np.uint64(block.shape[1])
        if by_two:
            while column + np.uint64(LANES) < width:
                for t in range(start, stop, 6):
                    _six_of_two(nu, panels, panel, t, stop - 1, b, block, to, by, column)
                column += np.uint64(2 * LANES)
                panel += np.uint64(2 * nu.shape[2])
        while column < width:
            t = start
            while t < stop:
                if stop - t >= 6 and stop - t != 8:  # eight are four and four
                    _six(nu, panels, panel, t, b, block, to, by, column)
                    t += 6
                else:
                    _four(nu, panels, panel, t, stop - 1, b, block, to, by, column)
                    t += 4
            column += np.uint64(LANES)
            panel += np.uint64(nu.shape[2])

    return multiply
