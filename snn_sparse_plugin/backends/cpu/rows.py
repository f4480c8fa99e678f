"""The equations on one row of N neurons: synaptic input, one step of the neuron.

Rows are short and stay in cache, so each line is its own loop: the compiler vectorises all of them. The neuron
keeps upstream's order of float operations (see ``core/canonical.py``); only dot products may reorder.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from ...core.dynamics import RESETS, SCOPES, TIMINGS, UPDATES, NeuronSpec
from .bits import LANES
from .jit import kernel
from .lanes import add, along, load, mul, splat, store, sub, where_positive

DECAY, EULER, BOX = (UPDATES.index(x) for x in ("decay", "euler", "box"))
NONE, SUBTRACT, ZERO, VALUE = (RESETS.index(x) for x in ("none", "subtract", "zero", "value"))
DELAYED, IMMEDIATE, CORRECTED = (TIMINGS.index(x) for x in ("delayed", "immediate", "corrected"))
STATE, SUM = (SCOPES.index(x) for x in ("state", "sum"))
MEM, SYN, THRESHOLD, LEAK, RESET_VALUE = range(5)  # rows of params
# Rows of a kernel's own, padded as those of weights are, as a sum without a remainder is a fifth faster. In turn: what
# comes in, bias, the state, what a reset subtracts, u - threshold; then the parameters.
IN, REC, BIAS, V, SYNAPTIC, RESET, DISTANCE, OWN = range(8)
ROWS = OWN + 5


Code = tuple[int, ...]


def encode(spec: NeuronSpec, recurrent: bool) -> Code:
    """What a kernel is compiled for: update, synapse, reset, timing, scope, attached, spiking, recurrent.

    Constants, not arguments: with a branch left in the loop over steps LLVM gives up on the rows (three times slower).
    """
    return (
        UPDATES.index(spec.update),
        int(spec.synapse),
        RESETS.index(spec.reset),
        TIMINGS.index(spec.timing),
        SCOPES.index(spec.scope),
        int(spec.attached),
        int(spec.spiking),
        int(recurrent),
    )


def shared(code: Code) -> tuple[Code, bool]:
    """The member of the family whose forward does for this one as well, and whether a reset subtracts the threshold.

    Without a reset a member runs as one that subtracts zero.
    """
    update, synapse, kind, timing, scope, _, spiking, recurrent = code
    subtracts = is_plain(code) and kind == SUBTRACT
    if is_plain(code) and kind == NONE:
        kind = SUBTRACT
    return (update, synapse, kind, timing, scope if kind == ZERO else 0, 0, spiking, recurrent), subtracts


def is_plain(code: Code) -> bool:
    """Whether a step is the commonest one: delayed reset by subtraction, or none."""
    update, _, kind, timing, _, _, spiking, recurrent = code
    return update == DECAY and bool(spiking) and timing == DELAYED and kind != ZERO and not recurrent


@kernel(forceinline=True)
def copy_row(out, row):  # type: ignore[no-untyped-def]
    """``out[:] = row``, vectorised: numba's own assignment checks for broadcasting and overlap."""
    for j in range(out.shape[0]):
        out[j] = row[j]


# Rows of larger arrays are indexed, not sliced: a slice is an array object, which counts references where its kernel
# allocates. The indices are unsigned, so that there is no test for counting from the end.


@kernel(forceinline=True)
def load2(out, x, k):  # type: ignore[no-untyped-def]
    """``out[:] = x[k]``"""
    i = np.uint64(k)
    for j in range(out.shape[0]):
        out[j] = x[i, j]


@kernel(forceinline=True)
def load3(out, x, t, b):  # type: ignore[no-untyped-def]
    """``out[:] = x[t, b]``"""
    i, k = np.uint64(t), np.uint64(b)
    for j in range(out.shape[0]):
        out[j] = x[i, k, j]


@kernel(forceinline=True)
def store2(x, k, row):  # type: ignore[no-untyped-def]
    """``x[k] = row``"""
    i = np.uint64(k)
    for j in range(row.shape[0]):
        x[i, j] = row[j]


@kernel(forceinline=True)
def store3(x, t, b, row):  # type: ignore[no-untyped-def]
    """``x[t, b] = row``"""
    i, k = np.uint64(t), np.uint64(b)
    for j in range(row.shape[0]):
        x[i, k, j] = row[j]


@kernel(forceinline=True)
def add_rows(out, k, x, indices, values, first, last):  # type: ignore[no-untyped-def]
    """``out[k] += value * x[index]`` for the entries first..last; four at a time to save passes over out.

    Rows are whole vectors. ``k`` is no literal: each would be compiled for itself.
    """
    row, width, zero, lanes = np.uint64(k), np.uint64(out.shape[1]), np.uint64(0), np.uint64(LANES)
    e = first
    # few neurons: their row stays in a register; the order of the sum is that of longer rows
    if width == lanes and values.shape[0] == 0:
        total = load(out, row, zero)
        while e + 4 <= last:
            p, q = load(x, np.uint64(indices[e]), zero), load(x, np.uint64(indices[e + 1]), zero)
            r, s = load(x, np.uint64(indices[e + 2]), zero), load(x, np.uint64(indices[e + 3]), zero)
            total = add(total, add(add(p, q), add(r, s)))
            e += 4
        while e < last:
            total = add(total, load(x, np.uint64(indices[e]), zero))
            e += 1
        store(out, row, zero, total)
        return
    if values.shape[0] > 0:
        while e < last:
            a, value, j = np.uint64(indices[e]), splat(values[e]), zero
            while j < width:
                store(out, row, j, add(load(out, row, j), mul(value, load(x, a, j))))
                j += lanes
            e += 1
        return
    while e + 4 <= last:
        a, b = np.uint64(indices[e]), np.uint64(indices[e + 1])
        c, d, j = np.uint64(indices[e + 2]), np.uint64(indices[e + 3]), zero
        while j < width:
            four = add(add(load(x, a, j), load(x, b, j)), add(load(x, c, j), load(x, d, j)))
            store(out, row, j, add(load(out, row, j), four))
            j += lanes
        e += 4
    while e < last:
        a, j = np.uint64(indices[e]), zero
        while j < width:
            store(out, row, j, add(load(out, row, j), load(x, a, j)))
            j += lanes
        e += 1


# the sums below are the only ones that may be reordered, to vectorise
_reordered = kernel(forceinline=True, fastmath={"reassoc", "nsz", "contract"})


@_reordered
def dot(weight, index, b):  # type: ignore[no-untyped-def]
    """``weight[index] @ b``"""
    i = np.uint32(index)
    total = b.dtype.type(0)
    for j in range(b.shape[0]):
        total += weight[i, j] * b[j]
    return total


@kernel(forceinline=True)
def reset_row(code, params, v, reset):  # type: ignore[no-untyped-def]
    """R: 1 where the state is above threshold before a delayed or corrected update. Whether there is one."""
    if code[2] == NONE or code[3] == IMMEDIATE:
        return False
    one, zero = v.dtype.type(1), v.dtype.type(0)
    threshold = params[THRESHOLD]
    for j in range(v.shape[0]):
        reset[j] = one if v[j] - threshold[j] > zero else zero
    return True


@kernel(forceinline=True)
def fill_rows(rows, params, bias, subtracts):  # type: ignore[no-untyped-def]
    """What a kernel's own rows, zeros until then, begin with. ``subtracts``: whether a reset by subtraction is one."""
    N = params.shape[1]
    for k in range(params.shape[0]):
        load2(rows[OWN + k, :N], params, k)
    copy_row(rows[BIAS, : bias.shape[0]], bias)
    if subtracts:
        copy_row(rows[RESET, :N], rows[OWN + THRESHOLD, :N])


@along
@kernel(forceinline=True)
def from_bias(k, arguments):  # type: ignore[no-untyped-def]
    """``out[i] = bias``, which is one of the rows"""
    out, i, rows = arguments
    store(out, i, k, load(rows, np.uint64(BIAS), k))


@cache
def plain_step(synapse: int) -> Callable[..., None]:
    """The commonest step (delayed reset by subtraction, or none), in one pass over registers.

    Of ``(rows, xs, at, out, to)``: the current is ``xs[at]``, u - threshold comes to ``out[to]``.
    """

    @along
    @kernel(forceinline=True)
    def step(k, arguments):  # type: ignore[no-untyped-def]
        rows, xs, at, out, to = arguments
        x, v = load(xs, at, k), load(rows, np.uint64(V), k)
        threshold = load(rows, np.uint64(OWN + THRESHOLD), k)
        if synapse:
            x = add(mul(load(rows, np.uint64(OWN + SYN), k), load(rows, np.uint64(SYNAPTIC), k)), x)
            store(rows, np.uint64(SYNAPTIC), k, x)
        reset = where_positive(sub(v, threshold), load(rows, np.uint64(RESET), k))
        u = sub(add(mul(load(rows, np.uint64(OWN + MEM), k), v), x), reset)
        store(rows, np.uint64(V), k, u)
        store(out, to, k, sub(u, threshold))

    return step  # type: ignore[no-any-return]


@cache
def advance_kernel(code: Code) -> Callable[..., None]:
    """One step of one member of the neuron family but the plain ones; the branches of others are never compiled."""
    update, synapse, kind, timing, scope, _, spiking, recurrent = code

    @kernel(forceinline=True)
    def advance(params, x, rec, v, i, reset, distance):  # type: ignore[no-untyped-def]
        """One step in place: v, i become the new state, ``reset`` holds R, ``distance`` u - threshold."""
        N = v.shape[0]
        one, zero = v.dtype.type(1), v.dtype.type(0)  # a bare 1 is an int64 and would make float64 of float32
        mem, syn, threshold = params[MEM], params[SYN], params[THRESHOLD]
        leak, reset_value = params[LEAK], params[RESET_VALUE]
        carried = reset_row(code, params, v, reset)

        if update == DECAY:
            if carried and kind == ZERO and scope == STATE:
                for j in range(N):
                    v[j] = (one - reset[j]) * v[j]
            if synapse:
                for j in range(N):
                    i[j] = syn[j] * i[j] + x[j]
                if recurrent:
                    for j in range(N):
                        i[j] = i[j] + rec[j]
                for j in range(N):
                    v[j] = mem[j] * v[j] + i[j]
            else:
                for j in range(N):
                    v[j] = mem[j] * v[j] + x[j]
                if recurrent:
                    for j in range(N):
                        v[j] = v[j] + rec[j]
            if carried and kind == SUBTRACT:
                for j in range(N):
                    v[j] = v[j] - reset[j] * threshold[j]
            elif carried and scope == SUM:
                for j in range(N):
                    v[j] = v[j] - reset[j] * v[j]
        elif update == EULER:
            for j in range(N):
                i[j] = i[j] + x[j]
            if recurrent:
                for j in range(N):
                    i[j] = i[j] + rec[j]
            for j in range(N):
                v[j] = v[j] + mem[j] * ((leak[j] - v[j]) + i[j])
            for j in range(N):
                i[j] = i[j] + -syn[j] * i[j]
        else:
            if recurrent:
                for j in range(N):
                    v[j] = v[j] + mem[j] * (((x[j] + rec[j]) + leak[j]) - v[j])
            else:
                for j in range(N):
                    v[j] = v[j] + mem[j] * ((x[j] + leak[j]) - v[j])

        if not spiking:
            return
        for j in range(N):
            distance[j] = v[j] - threshold[j]
        if kind == NONE or timing == DELAYED:
            return
        if timing == CORRECTED:
            if kind == SUBTRACT:
                for j in range(N):
                    z = (one if distance[j] > zero else zero) - reset[j]
                    v[j] = v[j] - z * threshold[j]
            else:
                for j in range(N):
                    z = (one if distance[j] > zero else zero) - reset[j]
                    v[j] = v[j] - z * v[j]
        elif kind == SUBTRACT:
            for j in range(N):
                v[j] = distance[j] if distance[j] > zero else v[j]
        elif kind == VALUE:
            for j in range(N):
                # zero * v: an infinite membrane becomes NaN, as upstream's, and is seen at the end
                v[j] = zero * v[j] + reset_value[j] if distance[j] > zero else v[j]
        else:
            for j in range(N):
                v[j] = zero * v[j] if distance[j] > zero else v[j]

    return advance  # type: ignore[no-any-return]
