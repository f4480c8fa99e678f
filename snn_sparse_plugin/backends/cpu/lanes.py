"""Vectors of sixteen lanes as values of a kernel, for the loops that LLVM does not vectorise or keep in registers.

``load`` and ``store`` work on rows that are padded to whole vectors; between them stands plain arithmetic. LLVM lowers
a vector to whatever registers the machine has.

    x = load(rows, k, j)                       # rows[k, j : j + 16]
    store(rows, k, j, fma(load(w, i, j), x, zeros(rows)))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from .bits import LANES
from .jit import kernel


class Lanes(types.Type):  # type: ignore[misc]
    """The type of a vector, by the dtype of its lanes."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


_ELEMENTS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.int32: ir.IntType(32)}


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, ir.VectorType(_ELEMENTS[fe_type.dtype], LANES))


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, row: Any, column: Any) -> Any:
    """Where ``array[row, column]`` of a C-ordered array begins, as a pointer to a vector."""
    fields = context.make_array(array_type)(context, builder, array)
    at = builder.add(builder.mul(row, builder.extract_value(fields.shape, 1)), column)
    vector = ir.VectorType(_ELEMENTS[array_type.dtype], LANES)
    return builder.bitcast(builder.gep(fields.data, [at], inbounds=True), vector.as_pointer())


@intrinsic
def load(typingctx: Any, array: Any, row: Any, column: Any) -> Any:
    """``array[row, column : column + 16]``"""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *args)
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return Lanes(array.dtype)(array, types.uint64, types.uint64), codegen


@intrinsic
def store(typingctx: Any, array: Any, row: Any, column: Any, x: Any) -> Any:
    """``array[row, column : column + 16] = x``"""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *args[:3])
        builder.store(args[3], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(array, types.uint64, types.uint64, x), codegen


@intrinsic
def zeros(typingctx: Any, array: Any) -> Any:
    """A vector of zeros of the array's dtype."""
    lanes = Lanes(array.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(lanes), None)

    return lanes(array), codegen


@intrinsic
def splat(typingctx: Any, x: Any) -> Any:
    """A number in every lane."""
    lanes = Lanes(x)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = context.get_value_type(lanes)
        undefined = ir.Constant(vector, ir.Undefined)
        first = builder.insert_element(undefined, args[0], ir.IntType(32)(0))
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
        return builder.shuffle_vector(first, undefined, everywhere)

    return lanes(x), codegen


@intrinsic
def add(typingctx: Any, a: Any, b: Any) -> Any:
    """``a + b``"""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(*args)

    return a(a, a), codegen


@intrinsic
def sub(typingctx: Any, a: Any, b: Any) -> Any:
    """``a - b``"""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fsub(*args)

    return a(a, a), codegen


@intrinsic
def mul(typingctx: Any, a: Any, b: Any) -> Any:
    """``a * b``"""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(*args)

    return a(a, a), codegen


@intrinsic
def div(typingctx: Any, a: Any, b: Any) -> Any:
    """``a / b``"""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fdiv(*args)

    return a(a, a), codegen


@intrinsic
def where_positive(typingctx: Any, a: Any, b: Any) -> Any:
    """``b`` where ``a > 0``, else 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        nothing = ir.Constant(args[0].type, None)
        return builder.select(builder.fcmp_ordered(">", args[0], nothing), args[1], nothing)

    return a(a, a), codegen


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` of vectors or of single numbers, rounded once where the machine can."""
    form = f"v{LANES}f{a.dtype.bitwidth}" if isinstance(a, Lanes) else f"f{a.bitwidth}"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(args[0].type, [args[0].type] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.{form}")
        return builder.call(function, args)

    return a(a, a, a), codegen


@intrinsic
def totals(typingctx: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The sums over the lanes of four vectors: halves of two are added side by side, which takes a third of the
    shuffles of four sums."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def pick(x: Any, y: Any, lanes: list[int]) -> Any:
            mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
            return builder.shuffle_vector(x, y, mask)

        def folded(x: Any, y: Any, group: int) -> Any:
            """Each group of lanes of x, then of y, added half to half."""
            starts = range(0, 2 * LANES, group)
            low = [s + k for s in starts for k in range(group // 2)]
            return builder.fadd(pick(x, y, low), pick(x, y, [k + group // 2 for k in low]))

        ab, cd = folded(args[0], args[1], LANES), folded(args[2], args[3], LANES)
        sums, group = folded(ab, cd, LANES // 2), LANES // 4  # four groups, one of each vector
        while group > 1:
            low = [s + k % (group // 2) for s in range(0, LANES, group) for k in range(group)]
            sums = builder.fadd(pick(sums, sums, low), pick(sums, sums, [k + group // 2 for k in low]))
            group //= 2
        found = [builder.extract_element(sums, ir.IntType(32)(k * LANES // 4)) for k in range(4)]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(a.dtype, 4)(a, b, c, d), codegen


def along(step: Callable[..., None]) -> Any:
    """A loop over the columns of a row, ``step(column, arguments)`` for each vector of it: call it with the width and
    the arguments.

    It runs in blocks of 8, 4, 2 and 1 vectors, so that each of its branches goes the same way for all rows of one
    width. A loop of 13 rounds between branches that depend on data is left at a wrong guess: 15 % of a kernel's time.
    """

    @kernel(forceinline=True)
    def run(width, arguments):  # type: ignore[no-untyped-def]
        columns, column, lanes = np.uint64(width), np.uint64(0), np.uint64(LANES)
        while column + np.uint64(8 * LANES) <= columns:
            for _ in range(8):
                step(column, arguments)
                column += lanes
        if columns & np.uint64(4 * LANES):
            for _ in range(4):
                step(column, arguments)
                column += lanes
        if columns & np.uint64(2 * LANES):
            for _ in range(2):
                step(column, arguments)
                column += lanes
        if columns & lanes:
            step(column, arguments)

    return run
