"""``exp`` as plain arithmetic, which LLVM turns into vector code: the library's is a call for each number."""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

# x = n log(2) + r with |r| <= log(2) / 2: log(2) in two parts, so that n times the first is exact [Cephes]
_SINGLE = (0.693359375, -2.12194440e-4)
_DOUBLE = (6.93145751953125e-1, 1.42860682030941723212e-6)
# exp(r) = 1 + r + r^2 p(r)
_POLYNOMIAL = (
    *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2),
    *(1.6666665459e-1, 5.0000001201e-1),
)
# exp(r) = 1 + 2 r p(r^2) / (q(r^2) - r p(r^2))
_ABOVE = (1.26177193074810590878e-4, 3.02994407707441961300e-2, 9.99999999999999999910e-1)
_BELOW = (3.00198505138664455042e-6, 2.52448340349684104192e-3, 2.27265548208155028766e-1, 2.0)


@intrinsic
def exp_negative(typingctx: Any, x: Any) -> Any:
    """``exp(x)`` for x <= 0, within 2 units in the last place; 0 where the result has not all its digits."""
    single = x == types.float32

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number, bits, digits = (
            (ir.FloatType(), ir.IntType(32), 23) if single else (ir.DoubleType(), ir.IntType(64), 52)
        )
        bias = 127 if single else 1023

        def value(c: float) -> Any:
            return ir.Constant(number, c)

        def fma(a: Any, b: Any, c: Any) -> Any:
            kind = ir.FunctionType(number, [number] * 3)
            name = f"llvm.fmuladd.f{x.bitwidth}"
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])

        def horner(coefficients: tuple[float, ...], at: Any) -> Any:
            total = value(coefficients[0])
            for c in coefficients[1:]:
                total = fma(total, at, value(c))
            return total

        one = value(1.0)
        high, low = _SINGLE if single else _DOUBLE
        smallest = value((1 - bias) * math.log(2))
        given = args[0]
        # a comparison that keeps NaN
        under = builder.fcmp_ordered("<", given, smallest)
        arg = builder.select(under, smallest, given)
        # added to 1.5 * 2^digits a number is rounded, and n stands in the lowest bits
        shifted = fma(arg, value(1 / math.log(2)), value(1.5 * 2.0**digits))
        n = builder.fsub(shifted, value(1.5 * 2.0**digits))
        r = fma(n, value(-low), fma(n, value(-high), arg))
        if single:
            found = fma(builder.fmul(r, r), horner(_POLYNOMIAL, r), builder.fadd(r, one))
        else:
            square = builder.fmul(r, r)
            p = builder.fmul(r, horner(_ABOVE, square))
            found = fma(value(2.0), builder.fdiv(p, builder.fsub(horner(_BELOW, square), p)), one)
        exponent = builder.shl(builder.bitcast(shifted, bits), ir.Constant(bits, digits))
        power = builder.bitcast(builder.add(exponent, ir.Constant(bits, bias << digits)), number)
        return builder.select(under, value(0.0), builder.fmul(found, power))

    return x(x), codegen
