"""Neurons given by equations: one pair of kernels that interprets any program, a row of neurons an operation.

Nothing is compiled for a new neuron. An operation costs its loop over the row and a few nanoseconds, so that a step
of twenty of them is still far cheaper than one operation of torch. The backward replays each chunk of steps from its
checkpoint and runs the program's adjoint, the same list read from its end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ...core.backend import CHUNK, LayerCall
from ...core.equations import Equations
from ...core.programs import OPS, Program
from .bits import LANES, above16, append_columns, count_bits, pick_values, within16
from .jit import kernel
from .memory import array
from .rows import add_rows

ADD, SUB, MUL, DIV, NEG, EXP, LOG, RELU, ABS, SPIKE, ABOVE, DETACH, COPY = range(len(OPS))


@cache
def encoded(program: Program, params_grad: bool) -> tuple[np.ndarray, np.ndarray]:
    """The operations (kind, out, a, b, gradient to a, gradient to b), and the registers of s and of the site (-1 in a
    readout), of the first parameter, whether s is just the spike at the site, and how many inputs there are."""
    passes = program.passes(params_grad)
    rows = [
        (OPS.index(op.kind), op.out, op.a, op.b, *flags)
        for op, flags in zip(program.ops, passes, strict=True)
    ]
    places = (
        -1 if program.spikes is None else program.spikes,
        -1 if program.site is None else program.site,
        program.first_param,
        int(program.direct),
        len(program.inputs),
    )
    return np.array(rows, np.int32).reshape(-1, 6), np.array(places, np.int32)


def registers(call: LayerCall, width: int, dtype: np.dtype) -> np.ndarray:
    """The registers of one thread, with parameters and constants in place. Beyond column N parameters are 1: no NaN."""
    assert isinstance(call.spec, Equations)
    program = call.spec.program
    regs = np.zeros((program.registers, width), dtype)
    first, count = program.first_param, len(program.params)
    regs[first : first + count] = 1
    regs[first : first + count, : call.N] = array(call.params)
    for k, value in enumerate(program.constants):
        regs[first + count + k] = value
    return regs


@kernel()
def execute(ops, regs):  # type: ignore[no-untyped-def]
    """All operations of one step on registers (R, N padded)."""
    N = regs.shape[1]
    one, zero = regs.dtype.type(1), regs.dtype.type(0)
    for p in range(ops.shape[0]):
        kind = ops[p, 0]
        out, a, b = np.uint32(ops[p, 1]), np.uint32(ops[p, 2]), np.uint32(ops[p, 3])
        if kind == ADD:
            for j in range(N):
                regs[out, j] = regs[a, j] + regs[b, j]
        elif kind == SUB:
            for j in range(N):
                regs[out, j] = regs[a, j] - regs[b, j]
        elif kind == MUL:
            for j in range(N):
                regs[out, j] = regs[a, j] * regs[b, j]
        elif kind == DIV:
            for j in range(N):
                regs[out, j] = regs[a, j] / regs[b, j]
        elif kind == NEG:
            for j in range(N):
                regs[out, j] = -regs[a, j]
        elif kind == EXP:
            for j in range(N):
                regs[out, j] = np.exp(regs[a, j])
        elif kind == LOG:
            for j in range(N):
                regs[out, j] = np.log(regs[a, j])
        elif kind == RELU:
            for j in range(N):
                # NaN stays NaN, as in torch
                regs[out, j] = zero if regs[a, j] <= zero else regs[a, j]
        elif kind == ABS:
            for j in range(N):
                regs[out, j] = abs(regs[a, j])
        elif kind in (DETACH, COPY):
            for j in range(N):
                regs[out, j] = regs[a, j]
        else:
            for j in range(N):
                regs[out, j] = one if regs[a, j] > zero else zero


@kernel(forceinline=True)
def load_input(  # type: ignore[no-untyped-def]
    regs, x, t, b, r, current, still, indptr, indices, values, weight, bias
):
    """Row x of step t: the given current, or the bias and the rows of W^T of the events."""
    k = np.uint32(x)
    if weight.shape[0] > 0:
        for j in range(bias.shape[0]):
            regs[k, j] = bias[j]
        for j in range(bias.shape[0], regs.shape[1]):
            regs[k, j] = 0
        add_rows(regs, x, weight, indices, values, indptr[r], indptr[r + 1])
    else:
        at, sample = np.uint64(0 if still else t), np.uint64(b)
        for j in range(current.shape[2]):
            regs[k, j] = current[at, sample, j]


@kernel(forceinline=True)
def load_rec(regs, x, t, b, rec_weight, rec_bias, rec0, indices, none, first, last):  # type: ignore[no-untyped-def]
    """Row rec, which is after x: ``rec0`` at the first step, else from the events first..last of the last one."""
    k = np.uint32(x + 1)
    if t == 0:
        sample = np.uint64(b)
        for j in range(rec0.shape[1]):
            regs[k, j] = rec0[sample, j]
    else:
        for j in range(rec_bias.shape[0]):
            regs[k, j] = rec_bias[j]
        for j in range(rec_bias.shape[0], regs.shape[1]):
            regs[k, j] = 0
        add_rows(regs, x + 1, rec_weight, indices, none, first, last)


@kernel(forceinline=True, allocates=True)
def current_rows(regs, K, inputs, N):  # type: ignore[no-untyped-def]
    """Where x and rec are loaded, and the row of x: the registers themselves, or for several inputs two long rows."""
    if inputs == 1:
        return regs, K
    width = -(-inputs * N // LANES) * LANES
    return np.zeros((2, width), regs.dtype), 0


@kernel(forceinline=True)
def to_registers(rows, regs, K, inputs, N):  # type: ignore[no-untyped-def]
    """Two long rows to the registers of each input, and then of each recurrent input."""
    for c in range(2 * inputs):
        half = np.uint32(c // inputs)
        k, first = np.uint32(K + c), (c % inputs) * N
        for j in range(N):
            regs[k, j] = rows[half, first + j]


@cache
def _forward_kernel(dtype: np.dtype) -> Callable[..., Any]:
    pick = pick_values(dtype)

    @kernel(allocates=True)
    def forward_program(  # type: ignore[no-untyped-def]
        ops,
        places,
        results,
        membrane,
        regs,
        first,
        last,
        T,
        window,
        params,
        fed,
        states,
        written,
    ):
        """As ``forward`` in forward.py; the states are registers."""
        current, indptr, indices, values, weight, bias, rec_weight, rec_bias, rec0 = fed
        state, _, checkpoints, _ = states
        spikes, mem, out_ptr, out_idx, act_ptr, act_idx, act_x, counts = written
        K, N, width = state.shape[0], state.shape[2], regs.shape[1]
        dtype = regs.dtype
        spiking, recurrent = places[0] >= 0, rec_weight.shape[0] > 0
        emitted, site = np.uint32(max(places[0], 0)), np.uint32(max(places[1], 0))
        recorded = np.uint32(membrane)
        keep_events, keep_active = out_idx.shape[0] > 0, act_idx.shape[0] > 0
        limit, still = dtype.type(window), current.shape[0] == 1
        distance, fired = np.full(width, -np.inf, dtype), np.zeros(width, dtype)
        inputs = places[4]
        rows, x = current_rows(regs, K, inputs, N)
        n, n_act, seen = counts[0], counts[1], counts[2]
        none = np.empty(0, dtype)
        for b in range(first, last):
            if keep_events and n + T * N + LANES > out_idx.shape[0]:
                counts[0], counts[1], counts[2] = n, n_act, seen
                return b
            sample = np.uint64(b)
            for k in range(K):
                for j in range(N):
                    regs[np.uint32(k), j] = state[np.uint32(k), sample, j]
            previous = n
            for t in range(T):
                r, at = b * T + t, np.uint64(t)
                if checkpoints.shape[0] > 0 and t % CHUNK == 0:
                    chunk = np.uint64(t // CHUNK)
                    for k in range(K):
                        for j in range(N):
                            checkpoints[chunk, np.uint32(k), sample, j] = regs[np.uint32(k), j]
                load_input(rows, x, t, b, r, current, still, indptr, indices, values, weight, bias)
                if recurrent:
                    load_rec(rows, x, t, b, rec_weight, rec_bias, rec0, out_idx, none, previous, n)
                    previous = n
                if inputs > 1:
                    to_registers(rows, regs, K, inputs, N)
                execute(ops, regs)
                if spiking:
                    for j in range(N):
                        distance[j] = regs[site, j]
                        fired[j] = regs[emitted, j]
                # a result may be another state's register: those are read before any is overwritten
                for k in range(K):
                    if results[k] != k:
                        for j in range(N):
                            regs[np.uint32(k), j] = regs[np.uint32(results[k]), j]
                if mem.shape[0] > 0:
                    for j in range(N):
                        mem[at, sample, j] = regs[recorded, j]
                if not spiking:
                    continue
                if spikes.shape[0] > 0:
                    for j in range(N):
                        spikes[at, sample, j] = fired[j]
                if keep_events:
                    for k in range(0, width, LANES):
                        n = append_columns(above16(fired, k), k, out_idx, n)
                    out_ptr[r + 1] = n
                if window >= 0:
                    room = keep_active and n_act + width + LANES <= act_idx.shape[0]
                    for k in range(0, width, LANES):
                        mask = within16(distance, k, limit)
                        seen += count_bits(mask)
                        if room:
                            pick(mask, distance, k, act_x, n_act)
                            n_act = append_columns(mask, k, act_idx, n_act)
                    if keep_active:
                        act_ptr[r + 1] = n_act
            for k in range(K):
                for j in range(N):
                    state[np.uint32(k), sample, j] = regs[np.uint32(k), j]
        counts[0], counts[1], counts[2] = n, n_act, seen
        return last

    return forward_program


def bound(run: Callable[..., Any], call: LayerCall, width: int, dtype: np.dtype) -> Callable[..., Any]:
    assert isinstance(call.spec, Equations)
    program = call.spec.program
    ops, places = encoded(program, call.params_grad)
    results = np.array(program.results, np.int32)
    membrane = program.states.index(call.spec.membrane)

    def with_registers(*args: Any) -> Any:
        # the registers are a thread's own: made at every call
        return run(ops, places, results, membrane, registers(call, width, dtype), *args)

    return with_registers


def forward_of(call: LayerCall, width: int, dtype: np.dtype) -> Callable[..., Any]:
    """The forward of this call's program, with the arguments of ``forward`` in forward.py."""
    return bound(_forward_kernel(dtype), call, width, dtype)
