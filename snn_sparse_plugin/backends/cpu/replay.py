"""Backward kernel that recomputes each chunk of steps from its checkpoint.

For exact mode, for windows so wide that a list of active entries would be larger than the states, and for gradients
of decays and thresholds, which need the states themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ...core.backend import CHUNK
from .backward import decay_back, input_grad
from .jit import kernel
from .outgoing import deliver, deliver_recurrent
from .rows import (
    CORRECTED,
    DECAY,
    DELAYED,
    DISTANCE,
    EULER,
    IMMEDIATE,
    IN,
    LEAK,
    MEM,
    REC,
    RESET,
    RESET_VALUE,
    ROWS,
    STATE,
    SUBTRACT,
    SUM,
    SYN,
    SYNAPTIC,
    THRESHOLD,
    VALUE,
    ZERO,
    Code,
    V,
    add_rows,
    advance_kernel,
    copy_row,
    dot,
    fill_rows,
    from_bias,
    is_plain,
    load2,
    load3,
    plain_step,
    reset_row,
    store2,
)
from .surrogate import surrogate_row


@kernel(forceinline=True)
def _params_grad(code, params, phi, g, mu, lam, reset, carried, distance, v, i, jump, ci, out):  # type: ignore[no-untyped-def]
    """Add one step to the gradients of decays, threshold, leak and reset value."""
    update, _, kind, timing, scope, _, spiking, _ = code
    N = lam.shape[0]
    one, zero = lam.dtype.type(1), lam.dtype.type(0)
    mem, leak = params[MEM], params[LEAK]
    if spiking:
        for j in range(N):
            s = one if distance[j] > zero else zero
            out[THRESHOLD, j] -= phi[j] * g[j]
            if kind == SUBTRACT and timing != DELAYED:
                out[THRESHOLD, j] -= (s - reset[j]) * mu[j]
            elif kind == VALUE:
                out[RESET_VALUE, j] += s * mu[j]
    if carried and kind == SUBTRACT:
        for j in range(N):
            out[THRESHOLD, j] -= reset[j] * lam[j]
    for j in range(N):
        passed = lam[j]
        if carried and kind == ZERO:  # neither the state nor, with scope sum, the sum passes a reset
            passed = (one - reset[j]) * passed
        if update == DECAY:
            out[MEM, j] += passed * v[j]
            through = passed if scope == SUM else lam[j]
            out[SYN, j] += (through + ci[j]) * i[j]
        else:
            out[MEM, j] += lam[j] * ((leak[j] - v[j]) + jump[j])
            out[LEAK, j] += lam[j] * mem[j]
            out[SYN, j] -= ci[j] * jump[j]


@kernel(forceinline=True)
def settle_params(recent, first, out):  # type: ignore[no-untyped-def]
    """Add the gradients of a chunk of steps to the (P, N) of all, which are float64, and begin again from zero.

    One parameter gets a term from every sample and step: a float32 sum of so many loses three digits.
    """
    for k in range(out.shape[0]):
        row = np.uint32(first + k)
        for j in range(out.shape[1]):
            out[np.uint32(k), j] += recent[row, j]
            recent[row, j] = 0


@cache
def backward_replay_kernel(code: Code) -> Callable[..., Any]:
    """The backward that replays, for one member of the neuron family."""
    update, synapse, kind, timing, scope, attached, spiking, recurrent = code
    advance, plain, step = advance_kernel(code), is_plain(code), plain_step(synapse)

    @kernel(allocates=True)
    def backward_replay(  # type: ignore[no-untyped-def]
        first,
        last,
        T,
        derivative,
        params,
        checkpoints,
        current,
        bias,
        recurrence,  # rec_weight, rec_bias, rec0
        incoming,  # what came in and spiked, see outgoing.py
        active,
        arriving,  # gradients of active entries, of spikes and of the membrane: empty where there is none
        lam_state,
        ci_state,
        outgoing,
        g_params,  # (5, N) of this range, float64, or empty
        block,  # space for rows of nu, zero beyond column N
    ):
        window, surrogate, first_param, second_param = derivative
        v_checkpoints, i_checkpoints = checkpoints
        act_ptr, act_idx = active
        rec_weight, rec_bias, rec0 = recurrence
        indptr, indices, values, weight, _, _, out_ptr, out_idx = incoming
        g_out, g_spikes, g_mem = arriving
        N = lam_state.shape[1]
        dtype = lam_state.dtype
        one, zero = dtype.type(1), dtype.type(0)
        threshold, reset_value = params[THRESHOLD], params[RESET_VALUE]
        # the replayed chunk: states before each step, what was added to the current, u - threshold
        v_rows, i_rows = np.empty((CHUNK, N), dtype), np.zeros((CHUNK, N), dtype)
        jumps, distances = np.zeros((CHUNK, N), dtype), np.zeros((CHUNK, N), dtype)
        in_x, in_rec = np.int64(IN), np.int64(REC)
        # ``replayed``: resets of the steps that are replayed; of plain ones what they subtract
        rows = np.zeros((ROWS, block.shape[1]), dtype)
        fill_rows(rows, params, bias, plain and kind == SUBTRACT)
        x, rec, v, i = rows[IN, :N], rows[REC, :N], rows[V, :N], rows[SYNAPTIC, :N]
        replayed, distance = rows[RESET, :N], rows[DISTANCE, :N]
        reset, phi, g = np.zeros(N, dtype), np.zeros(N, dtype), np.zeros(N, dtype)
        mu, nu = np.empty(N, dtype), np.zeros(N, dtype)
        v_before, i_before = np.empty(N, dtype), np.zeros(N, dtype)
        jump = np.zeros(N, dtype)
        until = last * T
        has_out, has_spikes, has_mem = g_out.shape[0] > 0, g_spikes.shape[0] > 0, g_mem.shape[0] > 0
        from_events = indptr.shape[0] > 0
        want_params = g_params.shape[0] > 0
        recent = np.zeros((g_params.shape[0], N), dtype)
        still = current.shape[0] == 1
        for b in range(last - 1, first - 1, -1):
            lam, ci = lam_state[b], ci_state[b]
            for chunk in range((T - 1) // CHUNK, -1, -1):
                start, stop = chunk * CHUNK, min(T, chunk * CHUNK + CHUNK)
                load3(v, v_checkpoints, chunk, b)
                if synapse:
                    load3(i, i_checkpoints, chunk, b)
                for t in range(start, stop):
                    r, k = b * T + t, t - start
                    if from_events:
                        from_bias(rows.shape[1], (rows, np.uint64(IN), rows))
                        add_rows(rows, in_x, weight, indices, values, indptr[r], indptr[r + 1])
                    else:
                        load3(x, current, 0 if still else t, b)
                    if recurrent:
                        if t == 0:
                            load2(rec, rec0, b)
                        else:
                            copy_row(rec, rec_bias)
                            add_rows(
                                rows, in_rec, rec_weight, out_idx, values[:0], out_ptr[r - 1], out_ptr[r]
                            )
                    store2(v_rows, k, v)
                    if synapse:
                        store2(i_rows, k, i)
                    if want_params and update != DECAY:
                        for j in range(N):
                            jump[j] = x[j] + rec[j]
                        if update == EULER:
                            for j in range(N):
                                jump[j] = i[j] + jump[j]
                        store2(jumps, k, jump)
                    if plain:
                        step(rows.shape[1], (rows, rows, np.uint64(IN), rows, np.uint64(DISTANCE)))
                    else:
                        advance(params, x, rec, v, i, replayed, distance)
                    if spiking:
                        store2(distances, k, distance)

                for t in range(stop - 1, start - 1, -1):
                    r, k = b * T + t, t - start
                    load2(v_before, v_rows, k)
                    if spiking:
                        load2(distance, distances, k)
                    if has_mem:
                        at, sample = np.uint64(t), np.uint64(b)
                        for j in range(N):
                            lam[j] += g_mem[at, sample, j]
                    copy_row(mu, lam)
                    carried = reset_row(code, params, v_before, reset)
                    if spiking:
                        surrogate_row(surrogate, first_param, second_param, window, distance, phi)
                        if has_spikes:
                            load3(g, g_spikes, t, b)
                        else:
                            for j in range(N):
                                g[j] = zero
                        if has_out:
                            for a in range(act_ptr[r], act_ptr[r + 1]):
                                g[act_idx[a]] += g_out[a]
                        if recurrent and t < T - 1:
                            for j in range(N):
                                if phi[j] != 0:
                                    g[j] += dot(rec_weight, j, nu)
                        if attached:
                            for j in range(N):
                                u = distance[j] + threshold[j]
                                if kind == SUBTRACT:
                                    g[j] -= threshold[j] * mu[j]
                                elif kind == VALUE:
                                    g[j] += (reset_value[j] - u) * mu[j]
                                elif kind == ZERO:
                                    g[j] -= u * mu[j]
                        if timing == IMMEDIATE and kind in (VALUE, ZERO):
                            for j in range(N):
                                lam[j] = zero if distance[j] > zero else mu[j]
                        elif timing == CORRECTED and kind == ZERO:
                            for j in range(N):
                                lam[j] = (one - ((one if distance[j] > zero else zero) - reset[j])) * mu[j]
                        for j in range(N):
                            lam[j] += phi[j] * g[j]
                    if want_params:
                        load2(i_before, i_rows, k)
                        load2(jump, jumps, k)
                        _params_grad(
                            code,
                            params,
                            phi,
                            g,
                            mu,
                            lam,
                            reset,
                            carried,
                            distance,
                            v_before,
                            i_before,
                            jump,
                            ci,
                            recent,
                        )
                    if carried and kind == ZERO and scope == SUM:
                        for j in range(N):
                            lam[j] = (one - reset[j]) * lam[j]
                    input_grad(code, params, lam, ci, nu)
                    store2(block, r % block.shape[0], nu)
                    decay_back(code, params, lam)
                    if carried and kind == ZERO and scope == STATE:
                        for j in range(N):
                            lam[j] = (one - reset[j]) * lam[j]
                    if r % block.shape[0] == 0 or r == first * T:
                        deliver(block, r % block.shape[0], r, until, T, incoming, outgoing)
                        if recurrent:
                            deliver_recurrent(block, r % block.shape[0], r, until, T, incoming, outgoing)
                        until = r
                settle_params(recent, 0, g_params)

    return backward_replay
