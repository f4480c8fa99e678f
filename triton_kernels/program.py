"""Programs of neurons given by equations: a program is a constant, so each compiles to straight code in registers.

Registers and their adjoints are tuples that only grow: the forward appends one value an operation, the backward one
adjoint a register, from the last to the first.
"""

import triton
import triton.language as tl

from .surrogates import surrogate_grad


@triton.jit
def load_rows(ptr, row, stride, N, cols, mask, COUNT: tl.constexpr, OTHER: tl.constexpr):
    """``COUNT`` rows of N values, ``stride`` rows apart, as a tuple."""
    found = ()
    for k in tl.static_range(COUNT):
        found = found + (tl.load(ptr + (row + k * stride) * N + cols, mask=mask, other=OTHER),)
    return found


@triton.jit
def store_rows(ptr, row, stride, N, cols, mask, values, COUNT: tl.constexpr):
    for k in tl.static_range(COUNT):
        tl.store(ptr + (row + k * stride) * N + cols, values[k], mask=mask)


@triton.jit
def divide(a, b):
    """Rounded as IEEE says: Triton's own float32 division is faster and less exact."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def operate(KIND: tl.constexpr, a, b):
    """One operation of ``snn_sparse_plugin.core.equations``."""
    if KIND == "add":
        return a + b
    elif KIND == "sub":
        return a - b
    elif KIND == "mul":
        return a * b
    elif KIND == "div":
        return divide(a, b)
    elif KIND == "neg":
        return -a
    elif KIND == "exp":
        return tl.exp(a)
    elif KIND == "log":
        return tl.log(a)
    elif KIND == "relu":
        return tl.where(a <= 0, tl.zeros_like(a), a)
    elif KIND == "abs":
        return tl.abs(a)
    elif KIND == "spike" or KIND == "above":
        return (a > 0).to(a.dtype)
    else:
        return a


@triton.jit
def execute(states, currents, params, PROGRAM: tl.constexpr, CONSTANTS: tl.constexpr):
    """All registers of one step."""
    regs = states + currents + params
    for k in tl.static_range(len(CONSTANTS)):
        regs = regs + (tl.full(states[0].shape, CONSTANTS[k], states[0].dtype),)
    for p in tl.static_range(len(PROGRAM)):
        regs = regs + (operate(PROGRAM[p][0], regs[PROGRAM[p][1]], regs[PROGRAM[p][2]]),)
    return regs


@triton.jit
def select(regs, WHICH: tl.constexpr):
    """Some of the registers, as a tuple."""
    found = ()
    for k in tl.static_range(len(WHICH)):
        found = found + (regs[WHICH[k]],)
    return found


@triton.jit
def passed_back(
    KIND: tl.constexpr,
    SECOND: tl.constexpr,
    up,
    a,
    b,
    out,
    WINDOW: tl.constexpr,
    SURROGATE: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
):
    """What an operation sends to its first or second operand for the adjoint ``up`` of its result."""
    zero = tl.zeros_like(up)
    if KIND == "add":
        return up
    elif KIND == "sub":
        if SECOND:
            return -up
        else:
            return up
    elif KIND == "mul":
        if SECOND:
            return up * a
        else:
            return up * b
    elif KIND == "div":
        if SECOND:
            return -divide(up * out, b)
        else:
            return divide(up, b)
    elif KIND == "neg":
        return -up
    elif KIND == "exp":
        return up * out
    elif KIND == "log":
        return divide(up, a)
    elif KIND == "relu":
        return tl.where(a > 0, up, zero)
    elif KIND == "abs":
        return tl.where(a > 0, up, tl.where(a < 0, -up, zero))
    elif KIND == "copy":
        return up
    else:
        tl.static_assert(KIND == "spike", "no gradient passes this operation")
        phi = surrogate_grad(a, SURROGATE, P0, P1)
        if WINDOW is not None:
            phi = tl.where(tl.abs(a) < WINDOW, phi, zero)
        return up * phi


@triton.jit
def execute_back(
    regs,
    carried,
    g_s,
    BACKWARD: tl.constexpr,
    WINDOW: tl.constexpr,
    SURROGATE: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
):
    """The adjoints of all registers, last register first.

    ``BACKWARD`` holds for each: which states end in it, whether it is the output, and its uses as (kind, second
    operand, place of the result's adjoint, a, b, result).
    """
    adjoints = ()
    for n in tl.static_range(len(BACKWARD)):
        g = tl.zeros_like(g_s)
        for k in tl.static_range(len(BACKWARD[n][0])):
            g += carried[BACKWARD[n][0][k]]
        if BACKWARD[n][1]:
            g += g_s
        for u in tl.static_range(len(BACKWARD[n][2])):
            g += passed_back(
                BACKWARD[n][2][u][0],
                BACKWARD[n][2][u][1],
                adjoints[BACKWARD[n][2][u][2]],
                regs[BACKWARD[n][2][u][3]],
                regs[BACKWARD[n][2][u][4]],
                regs[BACKWARD[n][2][u][5]],
                WINDOW,
                SURROGATE,
                P0,
                P1,
            )
        adjoints = adjoints + (g,)
    return adjoints
