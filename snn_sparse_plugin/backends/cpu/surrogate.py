"""sigma'(x) of ``core/surrogates.py`` on a row of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from .exponential import exp_negative
from .jit import kernel

ANY = -1


def _compiled(of: int, **options: bool) -> Callable[..., Any]:
    """For the surrogate of this code; for ANY the code is an argument, and so is half the width of a window."""

    @kernel(**options)
    def surrogate_row(kind, first, second, window, x, out):  # type: ignore[no-untyped-def]
        """Zero where ``abs(x) >= window`` (window < 0: nowhere)."""
        N = out.shape[0]
        a, b = x.dtype.type(first), x.dtype.type(second)
        one, two = x.dtype.type(1), x.dtype.type(2)
        if of == 1 or (of < 0 and kind == 1):
            for j in range(N):
                q = a * abs(x[j]) + one
                out[j] = one / (q * q)
        elif of == 2 or (of < 0 and kind == 2):
            half, scale = a * x.dtype.type(0.5), x.dtype.type(math.pi / 2) * a
            for j in range(N):
                q = scale * x[j]
                out[j] = half / (one + q * q)
        elif of == 3 or of == 10 or (of < 0 and (kind == 3 or kind == 10)):  # tanh(x) is a sigmoid of 2 x
            slope, scale = (a, a) if of == 3 or (of < 0 and kind == 3) else (two * a, two * two)
            for j in range(N):
                e = exp_negative(-abs(slope * x[j]))
                out[j] = scale * e / ((e + one) * (e + one))
        elif of == 4 or (of < 0 and kind == 4):
            out[:] = one
        elif of == 5 or (of < 0 and kind == 5):
            for j in range(N):
                out[j] = -a if x[j] >= 0 else a
        elif of == 6 or (of < 0 and kind == 6):
            for j in range(N):
                out[j] = one if x[j] > 0 else one - one
        elif of == 7 or (of < 0 and kind == 7):
            for j in range(N):
                out[j] = b * exp_negative(-a * abs(x[j] - one))
        elif of == 8 or (of < 0 and kind == 8):
            for j in range(N):
                q = a * abs(x[j]) + one
                out[j] = (one if x[j] > b else one - one) / (q * q)
        elif of == 9 or (of < 0 and kind == 9):
            for j in range(N):
                out[j] = a * max(one - abs(x[j]), x.dtype.type(0))
        elif of == 11 or (of < 0 and kind == 11):
            for j in range(N):
                s = a * a + x[j] * x[j]
                root = np.sqrt(s)
                out[j] = (-(x[j] * x[j] / (two * s * root)) + one / (two * root)) * two * a
        elif of == 12 or (of < 0 and kind == 12):
            scale = x.dtype.type(2 / math.sqrt(math.pi))
            for j in range(N):
                q = a * x[j]
                out[j] = scale * exp_negative(-q * q)
        else:
            out[:] = 0
        if of < 0 and window >= 0:
            limit = x.dtype.type(window)
            for j in range(N):
                out[j] = out[j] if abs(x[j]) < limit else x.dtype.type(0)

    return surrogate_row  # type: ignore[no-any-return]


surrogate_row = _compiled(ANY, part=True)


@cache
def row_kernel(code: int) -> Callable[..., Any]:
    """:data:`surrogate_row` of one surrogate, compiled in a fifth of the time that all of them take."""
    return _compiled(code)
