"""Sixteen lanes at a time: which of them are nonzero, above, or within a distance. For numba kernels.

LLVM lowers these to one compare and one move-mask on AVX-512, and to a few instructions anywhere else.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16


def _lanes(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> tuple[Any, Any]:
    data = context.make_array(array_type)(context, builder, array).data
    element = context.get_data_type(array_type.dtype)
    vector = ir.VectorType(element, LANES)
    pointer = builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())
    return builder.load(pointer, align=array_type.dtype.bitwidth // 8), vector


def _splat(builder: Any, vector: Any, scalar: Any) -> Any:
    lane = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [ir.IntType(32)(0)] * LANES)
    return builder.shuffle_vector(lane, ir.Constant(vector, ir.Undefined), zeros)


@intrinsic
def nonzero16(typingctx: Any, row: Any, offset: Any) -> Any:
    """Bit k is set where ``row[offset + k] != 0``; NaN counts as nonzero."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes, vector = _lanes(context, builder, signature.args[0], *args)
        mask = builder.fcmp_unordered("!=", lanes, ir.Constant(vector, None))
        return builder.zext(builder.bitcast(mask, ir.IntType(LANES)), ir.IntType(32))

    return types.uint32(row, types.intp), codegen


@intrinsic
def above16(typingctx: Any, row: Any, offset: Any) -> Any:
    """Bit k is set where ``row[offset + k] > 0``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes, vector = _lanes(context, builder, signature.args[0], *args)
        mask = builder.fcmp_ordered(">", lanes, ir.Constant(vector, None))
        return builder.zext(builder.bitcast(mask, ir.IntType(LANES)), ir.IntType(32))

    return types.uint32(row, types.intp), codegen


@intrinsic
def within16(typingctx: Any, row: Any, offset: Any, distance: Any) -> Any:
    """Bit k is set where ``abs(row[offset + k]) < distance``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, at, scalar = args
        lanes, vector = _lanes(context, builder, signature.args[0], array, at)
        limit = _splat(builder, vector, scalar)
        fabs = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(vector, [vector]),
            f"llvm.fabs.v{LANES}f{signature.args[0].dtype.bitwidth}",
        )
        mask = builder.fcmp_ordered("<", builder.call(fabs, [lanes]), limit)
        return builder.zext(builder.bitcast(mask, ir.IntType(LANES)), ir.IntType(32))

    return types.uint32(row, types.intp, row.dtype), codegen


@intrinsic
def lowest_bit(typingctx: Any, mask: Any) -> Any:
    """Index of the lowest set bit of a nonzero mask."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = builder.cttz(args[0], ir.IntType(1)(1))
        return builder.zext(found, ir.IntType(64))

    return types.intp(types.uint32), codegen


@intrinsic
def count_bits(typingctx: Any, mask: Any) -> Any:
    """Number of set bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.ctpop(args[0]), ir.IntType(64))

    return types.intp(types.uint32), codegen
