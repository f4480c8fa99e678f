"""Sixteen lanes at a time: which of them are nonzero, above, or within a distance. For numba kernels.

LLVM lowers these to one compare and one move-mask on AVX-512, and to a few instructions anywhere else.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .jit import kernel

LANES = 16


def _lanes(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> tuple[Any, Any]:
    data = context.make_array(array_type)(context, builder, array).data
    element = context.get_data_type(array_type.dtype)
    vector = ir.VectorType(element, LANES)
    pointer = builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())
    return builder.load(pointer, align=array_type.dtype.bitwidth // 8), vector


def _splat(builder: Any, vector: Any, scalar: Any) -> Any:
    lane = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None)
    return builder.shuffle_vector(lane, ir.Constant(vector, ir.Undefined), zeros)


def _compare(operator: str, constant: float, ordered: bool) -> Any:
    """A mask function (row, offset) of one comparison with a constant."""

    def compare(typingctx: Any, row: Any, offset: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            lanes, vector = _lanes(context, builder, signature.args[0], *args)
            other = ir.Constant(vector, [vector.element(constant)] * LANES)
            test = builder.fcmp_ordered if ordered else builder.fcmp_unordered
            mask = builder.bitcast(test(operator, lanes, other), ir.IntType(LANES))
            return builder.zext(mask, ir.IntType(32))

        return types.uint32(row, types.intp), codegen

    return intrinsic(compare)


nonzero16 = _compare("!=", 0.0, ordered=False)  # bit k: row[offset + k] != 0; NaN counts as nonzero
ones16 = _compare("==", 1.0, ordered=True)
above16 = _compare(">", 0.0, ordered=True)


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


@intrinsic
def fetch(typingctx: Any, row: Any, offset: Any) -> Any:
    """Have ``row[offset]`` on its way into the cache; beyond the end nothing happens."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        i32, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        place = builder.bitcast(builder.gep(data, [args[1]]), pointer)
        builder.call(function, [place, i32(0), i32(3), i32(1)])  # to read, and again, data
        return context.get_dummy_value()

    return types.none(row, types.intp), codegen


def _compiles_for(feature: str) -> bool:
    """Whether numba compiles for processors with this feature: those like this one, or what NUMBA_CPU_FEATURES says."""
    chosen: str | None = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    if chosen is not None:
        return f"+{feature}" in chosen.split(",")
    return bool(llvm.get_host_cpu_features().get(feature, False))


# It packs the chosen lanes in one instruction, where a loop over set bits mispredicts at every spike; and it has 32
# registers of sixteen lanes.
HAS_AVX512 = _compiles_for("avx512f")


def _compress(builder: Any, lanes: Any, vector: Any, mask: Any, name: str) -> Any:
    bits = builder.bitcast(builder.trunc(mask, ir.IntType(LANES)), ir.VectorType(ir.IntType(1), LANES))
    kind = ir.FunctionType(vector, [vector, vector, bits.type])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.avx512.mask.compress.{name}")
    return builder.call(function, [lanes, ir.Constant(vector, None), bits])


def _store(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, lanes: Any) -> None:
    data = context.make_array(array_type)(context, builder, array).data
    pointer = builder.bitcast(builder.gep(data, [offset]), lanes.type.as_pointer())
    builder.store(lanes, pointer, align=array_type.dtype.bitwidth // 8)


@intrinsic
def _compress_columns(typingctx: Any, mask: Any, column: Any, out: Any, n: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        chosen, first, array, at = args
        i32 = ir.IntType(32)
        vector = ir.VectorType(i32, LANES)
        lanes = builder.add(
            _splat(builder, vector, builder.trunc(first, i32)), ir.Constant(vector, list(range(LANES)))
        )
        packed = _compress(builder, lanes, vector, chosen, "v16i32")
        _store(context, builder, signature.args[2], array, at, packed)
        return context.get_dummy_value()

    return types.none(types.uint32, types.intp, out, types.intp), codegen


@intrinsic
def _compress_floats(typingctx: Any, mask: Any, row: Any, column: Any, out: Any, n: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        chosen, source, first, array, at = args
        lanes, vector = _lanes(context, builder, signature.args[1], source, first)
        packed = _compress(builder, lanes, vector, chosen, "v16f32")
        _store(context, builder, signature.args[3], array, at, packed)
        return context.get_dummy_value()

    return types.none(types.uint32, row, types.intp, out, types.intp), codegen


# Without it the places of the set bits of eight lanes come from a table.
_HAS_PERMUTE = _compiles_for("avx2")
_HALF = LANES // 2
_PLACES = [([k for k in range(_HALF) if byte >> k & 1] + [0] * _HALF)[:_HALF] for byte in range(1 << _HALF)]


def _places(builder: Any, byte: Any) -> Any:
    """The places of the set bits of eight as lanes, then zeros."""
    small = ir.VectorType(ir.IntType(8), _HALF)
    pointer = builder.module.globals.get("places_of_bits")
    if pointer is None:
        rows = ir.Constant(ir.ArrayType(small, len(_PLACES)), [ir.Constant(small, row) for row in _PLACES])
        pointer = cgutils.global_constant(builder.module, "places_of_bits", rows)
    row = builder.load(builder.gep(pointer, [ir.IntType(64)(0), builder.zext(byte, ir.IntType(64))]))
    return builder.zext(row, ir.VectorType(ir.IntType(32), _HALF))


def _halves(builder: Any, mask: Any, n: Any) -> list[tuple[int, Any, Any]]:
    """Of the two halves of a mask: the first lane, the places of set bits, and where their entries begin."""
    byte = ir.IntType(_HALF)
    low, high = builder.trunc(mask, byte), builder.trunc(builder.lshr(mask, ir.IntType(32)(_HALF)), byte)
    after = builder.add(n, builder.zext(builder.ctpop(low), n.type))
    return [(0, _places(builder, low), n), (_HALF, _places(builder, high), after)]


@intrinsic
def _spread_columns(typingctx: Any, mask: Any, column: Any, out: Any, n: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        chosen, first, array, at = args
        for lane, places, begin in _halves(builder, chosen, at):
            start = builder.add(builder.trunc(first, ir.IntType(32)), ir.IntType(32)(lane))
            columns = builder.add(_splat(builder, places.type, start), places)
            _store(context, builder, signature.args[2], array, begin, columns)
        return context.get_dummy_value()

    return types.none(types.uint32, types.intp, out, types.intp), codegen


@intrinsic
def _permute_floats(typingctx: Any, mask: Any, row: Any, column: Any, out: Any, n: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        chosen, source, first, array, at = args
        lanes, vector = _lanes(context, builder, signature.args[1], source, first)
        half = ir.VectorType(vector.element, _HALF)
        for lane, places, begin in _halves(builder, chosen, at):
            picked = ir.Constant(places.type, list(range(lane, lane + _HALF)))
            kind = ir.FunctionType(half, [half, places.type])
            permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.permps")
            part = builder.shuffle_vector(lanes, ir.Constant(vector, ir.Undefined), picked)
            _store(context, builder, signature.args[3], array, begin, builder.call(permute, [part, places]))
        return context.get_dummy_value()

    return types.none(types.uint32, row, types.intp, out, types.intp), codegen


def _append_packed(mask, column, out, n):  # type: ignore[no-untyped-def]
    _compress_columns(mask, column, out, n)
    return n + count_bits(mask)


def _append_spread(mask, column, out, n):  # type: ignore[no-untyped-def]
    _spread_columns(mask, column, out, n)
    return n + count_bits(mask)


def _pick_packed(mask, row, column, out, n):  # type: ignore[no-untyped-def]
    _compress_floats(mask, row, column, out, n)


def _pick_permuted(mask, row, column, out, n):  # type: ignore[no-untyped-def]
    _permute_floats(mask, row, column, out, n)


def _pick_looped(mask, row, column, out, n):  # type: ignore[no-untyped-def]
    while mask != 0:
        out[n] = row[column + lowest_bit(mask)]
        n += 1
        mask &= mask - np.uint32(1)


_inline = kernel(forceinline=True)

append_columns = _inline(_append_packed if HAS_AVX512 else _append_spread)
"""``append_columns(mask, column, out, n)``: append ``column + k`` for every set bit k; returns the new ``n``.

May write up to 16 entries past the new end: ``out`` needs that much slack.
"""


def pick_values(dtype: np.dtype) -> Any:
    """The function ``(mask, row, column, out, n)`` that writes ``row[column + k]`` for every set bit k at ``n``."""
    if dtype != np.float32 or not (HAS_AVX512 or _HAS_PERMUTE):
        return _pick_by_bit
    return _pick_by_vector


_pick_by_bit = _inline(_pick_looped)
_pick_by_vector = _inline(_pick_packed if HAS_AVX512 else _pick_permuted)
