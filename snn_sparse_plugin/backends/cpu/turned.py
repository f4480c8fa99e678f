"""What every call does to every weight: to turn it over, and to look for numbers that are not finite."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .bits import LANES
from .jit import kernel
from .lanes import _pointer


def _place(
    context: Any, builder: Any, kind: Any, array: Any, row: Any, k: int, column: Any
) -> tuple[Any, int]:
    """Where ``array[row + k, column]`` is, and how it is aligned."""
    row = builder.add(row, ir.Constant(ir.IntType(64), k))
    return _pointer(context, builder, kind, array, row, column), kind.dtype.bitwidth // 8


def _rows(context: Any, builder: Any, kind: Any, x: Any, i: Any, j: Any) -> list[Any]:
    """``x[i : i + 16, j : j + 16]``"""
    places = [_place(context, builder, kind, x, i, k, j) for k in range(LANES)]
    return [builder.load(pointer, align=align) for pointer, align in places]


def _store_turned(context: Any, builder: Any, rows: list[Any], kind: Any, out: Any, j: Any, i: Any) -> Any:
    """``out[j : j + 16, i : i + 16]`` are the columns of rows: in registers, in half the time."""
    size = LANES // 2
    while size:  # blocks of this size off the diagonal change places
        first = [c + LANES - size if c & size else c for c in range(LANES)]
        second = [c + LANES if c & size else c + size for c in range(LANES)]
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), LANES), m) for m in (first, second)]
        for k in range(LANES):
            if not k & size:
                pair = rows[k], rows[k + size]
                rows[k], rows[k + size] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        size //= 2
    for k, row in enumerate(rows):
        pointer, align = _place(context, builder, kind, out, j, k, i)
        builder.store(row, pointer, align=align)
    return context.get_dummy_value()


@intrinsic
def _turn16(typingctx: Any, x: Any, i: Any, j: Any, out: Any) -> Any:
    """``out[j : j + 16, i : i + 16] = x[i : i + 16, j : j + 16].T``"""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, i, j, out = args
        rows = _rows(context, builder, signature.args[0], x, i, j)
        return _store_turned(context, builder, rows, signature.args[3], out, j, i)

    return types.none(x, types.uint64, types.uint64, out), codegen


@intrinsic
def _turn16_of_sum(typingctx: Any, x: Any, more: Any, i: Any, j: Any, out: Any) -> Any:
    """The same of ``x + more``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, more, i, j, out = args
        pairs = zip(
            _rows(context, builder, signature.args[0], x, i, j),
            _rows(context, builder, signature.args[1], more, i, j),
            strict=True,
        )
        rows = [builder.fadd(*pair) for pair in pairs]
        return _store_turned(context, builder, rows, signature.args[4], out, j, i)

    return types.none(x, more, types.uint64, types.uint64, out), codegen


@kernel()
def turn(x, more, out):  # type: ignore[no-untyped-def]
    """``out = x.T``, or ``(x + more).T`` if there is more. Rows of x that go on beyond out are padding; rows of out
    that go on beyond x are padded with 0."""
    n, m = min(x.shape[0], out.shape[1]), min(x.shape[1], out.shape[0])
    whole_n, whole_m = n - n % LANES, m - m % LANES
    adds = more.shape[0] > 0
    for j in range(0, whole_m, LANES):
        if adds:
            for i in range(0, whole_n, LANES):
                _turn16_of_sum(x, more, np.uint64(i), np.uint64(j), out)
        else:
            for i in range(0, whole_n, LANES):
                _turn16(x, np.uint64(i), np.uint64(j), out)
    for j in range(m):
        for i in range(whole_n if j < whole_m else 0, n):
            k, column = np.uint64(i), np.uint64(j)
            out[column, k] = x[k, column] + more[k, column] if adds else x[k, column]
        for i in range(n, out.shape[1]):
            out[np.uint64(j), np.uint64(i)] = 0


@kernel(fastmath={"reassoc"})
def all_finite(x):  # type: ignore[no-untyped-def]
    """Whether no number of a flat array is NaN or infinite: zero times each of them is zero."""
    zero = x.dtype.type(0)
    total = zero
    for k in range(x.shape[0]):
        total += zero * x[k]
    return total == zero
