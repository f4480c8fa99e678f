"""Vectors of the kernels of convolutions: transpositions of maps, and the places of maxima."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .bits import LANES
from .jit import kernel

SIDE = 8

# one step of a transposition each: which of the numbers of two vectors go into one
_LOW, _HIGH = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
_LOW_PAIRS, _HIGH_PAIRS = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
_LOW_HALF, _HIGH_HALF = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]


@intrinsic
def _square(typingctx: Any, x: Any, at: Any, stride: Any, out: Any, to: Any, out_stride: Any) -> Any:
    """``out[0, to + j * out_stride + i] = x[0, at + i * stride + j]`` for i, j < 8."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = context.get_data_type(x.dtype)
        vector = ir.VectorType(element, SIDE)
        align = x.dtype.bitwidth // 8

        def pointer(which: int, k: int) -> Any:
            kind, (array, begin, step) = signature.args[which], args[which : which + 3]
            data = context.make_array(kind)(context, builder, array).data
            offset = builder.add(begin, builder.mul(step, step.type(k)))
            return builder.bitcast(builder.gep(data, [offset], inbounds=True), vector.as_pointer())

        def pick(a: Any, b: Any, lanes: list[int]) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), SIDE), lanes))

        r = [builder.load(pointer(0, k), align=align) for k in range(SIDE)]
        t = [pick(r[k], r[k + 1], lanes) for k in range(0, SIDE, 2) for lanes in (_LOW, _HIGH)]
        u = [
            pick(t[k + half], t[k + half + 2], lanes)
            for k in (0, 4)
            for half in (0, 1)
            for lanes in (_LOW_PAIRS, _HIGH_PAIRS)
        ]
        for k in range(4):
            builder.store(pick(u[k], u[k + 4], _LOW_HALF), pointer(3, k), align=align)
            builder.store(pick(u[k], u[k + 4], _HIGH_HALF), pointer(3, k + 4), align=align)
        return context.get_dummy_value()

    n = types.uint64
    return types.none(x, n, n, out, n, n), codegen


@kernel(part=True)
def flip(x, at, rows, stride, columns, out, to, out_stride):  # type: ignore[no-untyped-def]
    """``out[0, to + j * out_stride + i] = x[0, at + i * stride + j]`` for i < rows and j < columns.

    What is left of eight is done again from eight before the end.
    """
    at, to, stride, out_stride = np.uint64(at), np.uint64(to), np.uint64(stride), np.uint64(out_stride)
    rows, columns, side, zero = np.uint64(rows), np.uint64(columns), np.uint64(SIDE), np.uint64(0)
    if rows < side or columns < side:
        for j in range(columns):
            for i in range(rows):
                out[zero, to + j * out_stride + i] = x[zero, at + i * stride + j]
        return
    for j in range(zero, columns, side):
        j = min(j, columns - side)
        for i in range(zero, rows, side):
            i = min(i, rows - side)
            _square(x, at + i * stride + j, stride, out, to + j * out_stride + i, out_stride)


@intrinsic
def if_larger(typingctx: Any, x: Any, best: Any, a: Any, b: Any) -> Any:
    """In lanes where x is above best, or NaN: a; else b."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        larger = builder.fcmp_ordered(">", args[0], args[1])
        return builder.select(
            builder.or_(larger, builder.fcmp_unordered("uno", args[0], args[0])), args[2], args[3]
        )

    return a(x, x, a, a), codegen


@intrinsic
def store_places(typingctx: Any, places: Any, row: Any, column: Any, x: Any) -> Any:
    """``places[row, column : column + 16] = x``, of int32 lanes, into bytes or int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, vector = _places(context, builder, places, args)
        narrow = args[3] if places.dtype.bitwidth == 32 else builder.trunc(args[3], vector)
        builder.store(narrow, pointer, align=places.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(places, types.uint64, types.uint64, x), codegen


@intrinsic
def where_placed(typingctx: Any, places: Any, row: Any, column: Any, k: Any, x: Any) -> Any:
    """Lanes of x where ``places[row, column : column + 16] == k``, else zeros."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, vector = _places(context, builder, places, args)
        found = builder.load(pointer, align=places.dtype.bitwidth // 8)
        one = args[3] if places.dtype.bitwidth == 32 else builder.trunc(args[3], vector.element)
        same = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
        wanted = builder.shuffle_vector(
            builder.insert_element(ir.Constant(vector, ir.Undefined), one, ir.IntType(32)(0)),
            ir.Constant(vector, ir.Undefined),
            same,
        )
        return builder.select(
            builder.icmp_unsigned("==", found, wanted), args[4], ir.Constant(args[4].type, None)
        )

    return x(places, types.uint64, types.uint64, types.int32, x), codegen


def _places(context: Any, builder: Any, places: Any, args: Any) -> tuple[Any, Any]:
    """Where a vector of places begins, and its type."""
    fields = context.make_array(places)(context, builder, args[0])
    at = builder.add(builder.mul(args[1], builder.extract_value(fields.shape, 1)), args[2])
    vector = ir.VectorType(context.get_data_type(places.dtype), LANES)
    return builder.bitcast(builder.gep(fields.data, [at], inbounds=True), vector.as_pointer()), vector
