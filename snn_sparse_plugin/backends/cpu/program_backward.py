"""The backward of a neuron given by equations: the program's adjoint, read from its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...core.backend import CHUNK, LayerCall
from .jit import kernel
from .outgoing import deliver, deliver_recurrent
from .program import (
    ABS,
    ADD,
    COPY,
    DIV,
    EXP,
    LOG,
    MUL,
    NEG,
    RELU,
    SPIKE,
    SUB,
    bound,
    current_rows,
    execute,
    load_input,
    load_rec,
    to_registers,
)
from .replay import settle_params
from .rows import dot
from .surrogate import surrogate_row


@kernel()
def execute_back(ops, regs, adjoint, surrogate, first, second, window, site, phi):  # type: ignore[no-untyped-def]
    """The adjoint of :func:`execute`: reads and clears that of each result, adds to those of its operands."""
    N = regs.shape[1]
    zero = regs.dtype.type(0)
    for p in range(ops.shape[0] - 1, -1, -1):
        kind, to_a, to_b = ops[p, 0], ops[p, 4], ops[p, 5]
        out, a, b = np.uint32(ops[p, 1]), np.uint32(ops[p, 2]), np.uint32(ops[p, 3])
        if kind == ADD:
            if to_a:
                for j in range(N):
                    adjoint[a, j] += adjoint[out, j]
            if to_b:
                for j in range(N):
                    adjoint[b, j] += adjoint[out, j]
        elif kind == SUB:
            if to_a:
                for j in range(N):
                    adjoint[a, j] += adjoint[out, j]
            if to_b:
                for j in range(N):
                    adjoint[b, j] -= adjoint[out, j]
        elif kind == MUL:
            if to_a:
                for j in range(N):
                    adjoint[a, j] += adjoint[out, j] * regs[b, j]
            if to_b:
                for j in range(N):
                    adjoint[b, j] += adjoint[out, j] * regs[a, j]
        elif kind == DIV:
            if to_a:
                for j in range(N):
                    adjoint[a, j] += adjoint[out, j] / regs[b, j]
            if to_b:
                for j in range(N):
                    adjoint[b, j] -= adjoint[out, j] * regs[out, j] / regs[b, j]
        elif to_a:
            if kind == COPY:
                for j in range(N):
                    adjoint[a, j] += adjoint[out, j]
            elif kind == NEG:
                for j in range(N):
                    adjoint[a, j] -= adjoint[out, j]
            elif kind == EXP:
                for j in range(N):
                    adjoint[a, j] += adjoint[out, j] * regs[out, j]
            elif kind == LOG:
                for j in range(N):
                    adjoint[a, j] += adjoint[out, j] / regs[a, j]
            elif kind == RELU:
                for j in range(N):
                    adjoint[a, j] += adjoint[out, j] if regs[a, j] > zero else zero
            elif kind == ABS:
                for j in range(N):
                    up = adjoint[out, j]
                    adjoint[a, j] += up if regs[a, j] > zero else (-up if regs[a, j] < zero else zero)
            elif kind == SPIKE:
                for j in range(N):
                    site[j] = regs[a, j]
                surrogate_row(surrogate, first, second, window, site, phi)
                for j in range(N):
                    adjoint[a, j] += phi[j] * adjoint[out, j]
        for j in range(N):
            adjoint[out, j] = zero


@kernel(allocates=True)
def backward_program(  # type: ignore[no-untyped-def]
    ops,
    places,
    results,
    membrane,
    regs,
    first,
    last,
    T,
    derivative,
    params,
    checkpoints_of_states,
    current,
    bias,
    recurrence,
    incoming,
    active,
    arriving,
    lam,  # (K, B, N): gradient of the final states in, of the initial ones out
    __,
    outgoing,
    g_params,  # (P, N) of this range, float64, or empty
    block,
):
    """As ``backward_replay`` in replay.py, for any program."""
    window, surrogate, first_param, second_param = derivative
    checkpoints, _ = checkpoints_of_states
    act_ptr, act_idx = active
    rec_weight, rec_bias, rec0 = recurrence
    indptr, indices, values, weight, _in_ptr, _in_idx, out_ptr, out_idx = incoming
    g_out, g_spikes, g_mem = arriving
    K, N, width = lam.shape[0], lam.shape[2], regs.shape[1]
    dtype = regs.dtype
    inputs = places[4]
    rows, x = current_rows(regs, K, inputs, N)
    saved = K + 2 * inputs
    recurrent, spiking = rec_weight.shape[0] > 0, places[0] >= 0
    emitted, recorded = np.uint32(max(places[0], 0)), np.uint32(membrane)
    still = current.shape[0] == 1
    has_out, has_spikes, has_mem = g_out.shape[0] > 0, g_spikes.shape[0] > 0, g_mem.shape[0] > 0
    adjoint, carried = np.zeros(regs.shape, dtype), np.zeros((K, width), dtype)
    # what each step of the chunk starts from: its states and currents
    kept = np.zeros((CHUNK, saved, width), dtype)
    site, phi, nu = np.zeros(width, dtype), np.zeros(width, dtype), np.zeros(block.shape[1], dtype)
    looked_at, windowed = np.uint32(max(places[1], 0)), window >= 0 and places[3] == 1
    limit = dtype.type(window)
    none = np.empty(0, dtype)
    until = last * T
    for b in range(last - 1, first - 1, -1):
        sample = np.uint64(b)
        for k in range(K):
            for j in range(N):
                carried[np.uint32(k), j] = lam[np.uint32(k), sample, j]
        for j in range(nu.shape[0]):
            nu[j] = 0
        for chunk in range((T - 1) // CHUNK, -1, -1):
            start, stop = chunk * CHUNK, min(T, chunk * CHUNK + CHUNK)
            for k in range(K):
                for j in range(N):
                    regs[np.uint32(k), j] = checkpoints[np.uint64(chunk), np.uint32(k), sample, j]
            for t in range(start, stop):
                r, at = b * T + t, np.uint64(t - start)
                load_input(rows, x, t, b, r, current, still, indptr, indices, values, weight, bias)
                if recurrent:
                    before, after = (out_ptr[r - 1], out_ptr[r]) if t > 0 else (0, 0)
                    load_rec(rows, x, t, b, rec_weight, rec_bias, rec0, out_idx, none, before, after)
                if inputs > 1:
                    to_registers(rows, regs, K, inputs, N)
                for k in range(saved):
                    for j in range(width):
                        kept[at, np.uint32(k), j] = regs[np.uint32(k), j]
                execute(ops, regs)
                for k in range(K):
                    if results[k] != k:
                        for j in range(N):
                            regs[np.uint32(k), j] = regs[np.uint32(results[k]), j]
            for t in range(stop - 1, start - 1, -1):
                r, at = b * T + t, np.uint64(t - start)
                for k in range(saved):
                    for j in range(width):
                        regs[np.uint32(k), j] = kept[at, np.uint32(k), j]
                execute(ops, regs)
                # the gradients that arrive at this step
                if has_mem:
                    for j in range(N):
                        carried[recorded, j] += g_mem[np.uint64(t), sample, j]
                for k in range(K):
                    for j in range(N):
                        adjoint[np.uint32(results[k]), j] += carried[np.uint32(k), j]
                if spiking:
                    if has_spikes:
                        for j in range(N):
                            adjoint[emitted, j] += g_spikes[np.uint64(t), sample, j]
                    if has_out:
                        for a in range(act_ptr[r], act_ptr[r + 1]):
                            adjoint[emitted, np.uint32(act_idx[a])] += g_out[a]
                    if recurrent and t < T - 1:
                        for j in range(N):
                            if not windowed or abs(regs[looked_at, j]) < limit:
                                adjoint[emitted, j] += dot(rec_weight, j, nu)
                execute_back(ops, regs, adjoint, surrogate, first_param, second_param, window, site, phi)
                for k in range(K):
                    for j in range(N):
                        carried[np.uint32(k), j] = adjoint[np.uint32(k), j]
                        adjoint[np.uint32(k), j] = 0
                slot = np.uint64(r % block.shape[0])
                for c in range(inputs):
                    of_input, begin = np.uint32(K + c), c * N
                    for j in range(N):
                        nu[begin + j] = adjoint[of_input, j]
                        block[slot, begin + j] = adjoint[of_input, j]
                        adjoint[of_input, j] = 0
                if r % block.shape[0] == 0 or r == first * T:
                    deliver(block, r % block.shape[0], r, until, T, incoming, outgoing)
                    if recurrent:
                        deliver_recurrent(block, r % block.shape[0], r, until, T, incoming, outgoing)
                    until = r
            # the adjoints of the parameters are not cleared step by step: they are the sums over the chunk
            settle_params(adjoint, places[2], g_params)
        for k in range(K):
            for j in range(N):
                lam[np.uint32(k), sample, j] = carried[np.uint32(k), j]


def backward_of(call: LayerCall, width: int, dtype: np.dtype) -> Callable[..., Any]:
    """The backward of this call's program, with the arguments of ``backward_replay`` in replay.py."""
    return bound(backward_program, call, width, dtype)
