"""Backward kernels: the adjoint runs back in time per sample, in a few vectors of N values.

``backward_active`` needs only the active list: between active entries the adjoint decays. ``backward_replay``
recomputes each chunk from its checkpoint; it is for exact mode, wide windows, and gradients of decays and thresholds.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ...backends import CHUNK
from .rows import (
    BOX,
    CORRECTED,
    DECAY,
    DELAYED,
    EULER,
    IMMEDIATE,
    LEAK,
    MEM,
    NONE,
    RESET_VALUE,
    STATE,
    SUBTRACT,
    SUM,
    SYN,
    THRESHOLD,
    VALUE,
    ZERO,
    add_rows,
    advance,
    dot,
    reset_row,
    scatter_rows,
    surrogate_row,
)


@njit(nogil=True, cache=True)
def _emit(  # type: ignore[no-untyped-def]
    t, b, r, nu, indptr, indices, values, weight, in_ptr, in_idx, g_weight, g_bias, g_active, g_current
):
    """Everything that leaves from nu_t = dE/d(input current): weight, bias and input gradients."""
    N = nu.shape[0]
    if g_weight.shape[0] > 0:
        scatter_rows(g_weight, nu, indices, values, indptr[r], indptr[r + 1])
    if g_bias.shape[0] > 0:
        for j in range(N):
            g_bias[j] += nu[j]
    if g_active.shape[0] > 0:
        for a in range(in_ptr[r], in_ptr[r + 1]):
            g_active[a] = dot(weight[in_idx[a]], nu)
    if g_current.shape[0] > 0:
        g_current[t, b] = nu


@njit(nogil=True, cache=True)
def _emit_recurrent(  # type: ignore[no-untyped-def]
    t, b, r, nu, out_ptr, out_idx, g_rec_weight, g_rec_bias, g_rec0
):
    empty = np.empty(0, nu.dtype)
    if t == 0:
        if g_rec0.shape[0] > 0:
            g_rec0[b] = nu
        return
    if g_rec_weight.shape[0] > 0:
        scatter_rows(g_rec_weight, nu, out_idx, empty, out_ptr[r - 1], out_ptr[r])
    if g_rec_bias.shape[0] > 0:
        for j in range(nu.shape[0]):
            g_rec_bias[j] += nu[j]


@njit(nogil=True, cache=True)
def _carry(code, params, lam, cv, ci, nu):  # type: ignore[no-untyped-def]
    """nu_t and what flows to step t - 1, from lam_t = dE/d(sum before the reset)."""
    N = lam.shape[0]
    mem, syn = params[MEM], params[SYN]
    if code[0] == DECAY:
        if code[1]:
            for j in range(N):
                nu[j] = lam[j] + ci[j]
                ci[j] = syn[j] * nu[j]
        else:
            nu[:] = lam
        for j in range(N):
            cv[j] = mem[j] * lam[j]
    elif code[0] == EULER:
        for j in range(N):
            nu[j] = mem[j] * lam[j] + (1 - syn[j]) * ci[j]
            ci[j] = nu[j]
            cv[j] = (1 - mem[j]) * lam[j]
    else:
        for j in range(N):
            nu[j] = mem[j] * lam[j]
            cv[j] = (1 - mem[j]) * lam[j]


@njit(nogil=True, cache=True)
def backward_active(  # type: ignore[no-untyped-def]
    code,
    first,
    last,
    T,
    params,
    v0,
    indptr,
    indices,
    values,
    weight,
    in_ptr,
    in_idx,
    rec_weight,
    out_ptr,
    out_idx,
    act_ptr,
    act_idx,
    act_x,
    phi,  # sigma' of every active entry
    g_out,  # gradient of every active entry, or empty
    g_spikes,  # (T, B, N) or empty
    g_mem,
    cv_state,  # (B, N): gradient of the final state in, of the initial state out
    ci_state,
    g_weight,  # (M, N) of this range, and so on: empty where not wanted
    g_bias,
    g_active,
    g_current,
    g_rec_weight,
    g_rec_bias,
    g_rec0,
):
    _, _, kind, timing, scope, attached, _ = code
    N = v0.shape[1]
    dtype = v0.dtype
    threshold, reset_value = params[THRESHOLD], params[RESET_VALUE]
    mu, lam, nu = np.empty(N, dtype), np.empty(N, dtype), np.zeros(N, dtype)
    recurrent = rec_weight.shape[0] > 0
    has_out, has_spikes, has_mem = g_out.shape[0] > 0, g_spikes.shape[0] > 0, g_mem.shape[0] > 0
    for b in range(first, last):
        cv, ci = cv_state[b], ci_state[b]
        for t in range(T - 1, -1, -1):
            r = b * T + t
            mu[:] = cv
            if has_mem:
                row = g_mem[t, b]
                for j in range(N):
                    mu[j] += row[j]
            lam[:] = mu
            if timing == IMMEDIATE and (kind == VALUE or kind == ZERO):
                for e in range(out_ptr[r], out_ptr[r + 1]):
                    lam[out_idx[e]] = 0
            for a in range(act_ptr[r], act_ptr[r + 1]):
                j = act_idx[a]
                g = g_out[a] if has_out else dtype.type(0)
                if has_spikes:
                    g += g_spikes[t, b, j]
                if recurrent and t < T - 1:
                    g += dot(rec_weight[j], nu)
                if attached:
                    if kind == SUBTRACT:
                        g -= threshold[j] * mu[j]
                    elif kind == VALUE:
                        g += (reset_value[j] - (act_x[a] + threshold[j])) * mu[j]
                    elif kind == ZERO:
                        g -= (act_x[a] + threshold[j]) * mu[j]
                lam[j] += phi[a] * g
            # a delayed reset: what spiked at t - 1 passes nothing on to its state (or, scope sum, to anything)
            zeroes = timing == DELAYED and kind == ZERO
            if zeroes and scope == SUM:
                if t > 0:
                    for e in range(out_ptr[r - 1], out_ptr[r]):
                        lam[out_idx[e]] = 0
                else:
                    for j in range(N):
                        lam[j] = 0 if v0[b, j] - threshold[j] > 0 else lam[j]
            _carry(code, params, lam, cv, ci, nu)
            if zeroes and scope == STATE:
                if t > 0:
                    for e in range(out_ptr[r - 1], out_ptr[r]):
                        cv[out_idx[e]] = 0
                else:
                    for j in range(N):
                        cv[j] = 0 if v0[b, j] - threshold[j] > 0 else cv[j]
            _emit(
                *(t, b, r, nu, indptr, indices, values, weight, in_ptr, in_idx),
                *(g_weight, g_bias, g_active, g_current),
            )
            if recurrent:
                _emit_recurrent(t, b, r, nu, out_ptr, out_idx, g_rec_weight, g_rec_bias, g_rec0)


@njit(nogil=True, cache=True)
def backward_replay(  # type: ignore[no-untyped-def]
    code,
    first,
    last,
    T,
    window,
    surrogate,
    first_param,
    second_param,
    params,
    v_checkpoints,
    i_checkpoints,
    current,
    indptr,
    indices,
    values,
    weight,
    bias,
    in_ptr,
    in_idx,
    rec_weight,
    rec_bias,
    rec0,
    out_ptr,
    out_idx,
    act_ptr,
    g_out,
    act_idx,
    g_spikes,
    g_mem,
    cv_state,
    ci_state,
    g_weight,
    g_bias,
    g_active,
    g_current,
    g_rec_weight,
    g_rec_bias,
    g_rec0,
    g_params,  # (5, N) of this range, or empty
):
    update, synapse, kind, timing, scope, attached, spiking = code
    B, N = cv_state.shape
    dtype = cv_state.dtype
    mem, syn, threshold = params[MEM], params[SYN], params[THRESHOLD]
    leak, reset_value = params[LEAK], params[RESET_VALUE]
    # the replayed chunk: state before each step, the jump of the current, and u - threshold
    v_rows, i_rows = np.empty((CHUNK, N), dtype), np.empty((CHUNK, N), dtype)
    jumps, distances = np.zeros((CHUNK, N), dtype), np.zeros((CHUNK, N), dtype)
    v, i, x, rec = np.empty(N, dtype), np.zeros(N, dtype), np.empty(N, dtype), np.empty(N, dtype)
    reset, phi, g = np.zeros(N, dtype), np.zeros(N, dtype), np.zeros(N, dtype)
    mu, lam, nu = np.empty(N, dtype), np.empty(N, dtype), np.zeros(N, dtype)
    from_events, recurrent = weight.shape[0] > 0 and indptr.shape[0] > 0, rec_weight.shape[0] > 0
    has_out, has_spikes, has_mem = g_out.shape[0] > 0, g_spikes.shape[0] > 0, g_mem.shape[0] > 0
    want_params = g_params.shape[0] > 0
    still = current.shape[0] == 1
    empty = np.empty(0, dtype)
    for b in range(first, last):
        cv, ci = cv_state[b], ci_state[b]
        for chunk in range((T - 1) // CHUNK, -1, -1):
            start, stop = chunk * CHUNK, min(T, chunk * CHUNK + CHUNK)
            v[:] = v_checkpoints[chunk, b]
            if synapse:
                i[:] = i_checkpoints[chunk, b]
            for t in range(start, stop):
                r, k = b * T + t, t - start
                if from_events:
                    x[:] = bias
                    add_rows(x, weight, indices, values, indptr[r], indptr[r + 1])
                else:
                    x[:] = current[0 if still else t, b]
                if recurrent:
                    if t == 0:
                        rec[:] = rec0[b]
                    else:
                        rec[:] = rec_bias
                        add_rows(rec, rec_weight, out_idx, empty, out_ptr[r - 1], out_ptr[r])
                v_rows[k], i_rows[k] = v, i
                if update == EULER:  # j = i + x
                    for j in range(N):
                        jumps[k, j] = i[j] + x[j]
                else:
                    jumps[k] = x
                if recurrent:
                    for j in range(N):
                        jumps[k, j] += rec[j]
                advance(code, params, x, rec, recurrent, v, i, reset, distances[k])

            for t in range(stop - 1, start - 1, -1):
                r, k = b * T + t, t - start
                distance, v_before = distances[k], v_rows[k]
                mu[:] = cv
                if has_mem:
                    row = g_mem[t, b]
                    for j in range(N):
                        mu[j] += row[j]
                carried = reset_row(code, params, v_before, reset)
                lam[:] = mu
                if spiking:
                    surrogate_row(surrogate, first_param, second_param, window, distance, phi)
                    g[:] = 0
                    if has_spikes:
                        g[:] = g_spikes[t, b]
                    if has_out:
                        for a in range(act_ptr[r], act_ptr[r + 1]):
                            g[act_idx[a]] += g_out[a]
                    if recurrent and t < T - 1:
                        for j in range(N):
                            if phi[j] != 0:
                                g[j] += dot(rec_weight[j], nu)
                    if attached:
                        for j in range(N):
                            u = distance[j] + threshold[j]
                            if kind == SUBTRACT:
                                g[j] -= threshold[j] * mu[j]
                            elif kind == VALUE:
                                g[j] += (reset_value[j] - u) * mu[j]
                            elif kind == ZERO:
                                g[j] -= u * mu[j]
                    if timing == IMMEDIATE and (kind == VALUE or kind == ZERO):
                        for j in range(N):
                            lam[j] = 0 if distance[j] > 0 else mu[j]
                    elif timing == CORRECTED and kind == ZERO:
                        for j in range(N):
                            lam[j] = (1 - ((1 if distance[j] > 0 else 0) - reset[j])) * mu[j]
                    if want_params:
                        for j in range(N):
                            s = 1 if distance[j] > 0 else 0
                            g_params[THRESHOLD, j] -= phi[j] * g[j]
                            if kind == SUBTRACT and timing != DELAYED:
                                g_params[THRESHOLD, j] -= (s - reset[j]) * mu[j]
                            elif kind == VALUE:
                                g_params[RESET_VALUE, j] += s * mu[j]
                    for j in range(N):
                        lam[j] += phi[j] * g[j]
                if want_params and carried and kind == SUBTRACT:
                    for j in range(N):
                        g_params[THRESHOLD, j] -= reset[j] * lam[j]
                if carried and kind == ZERO and scope == SUM:
                    for j in range(N):
                        lam[j] = (1 - reset[j]) * lam[j]
                if want_params:
                    i_before, jump = i_rows[k], jumps[k]
                    if update == DECAY:
                        for j in range(N):
                            before = v_before[j]
                            if carried and kind == ZERO and scope == STATE:
                                before = (1 - reset[j]) * before
                            g_params[MEM, j] += lam[j] * before
                            g_params[SYN, j] += (lam[j] + ci[j]) * i_before[j]
                    else:
                        for j in range(N):
                            g_params[MEM, j] += lam[j] * ((leak[j] - v_before[j]) + jump[j])
                            g_params[LEAK, j] += lam[j] * mem[j]
                            g_params[SYN, j] -= ci[j] * jump[j]
                _carry(code, params, lam, cv, ci, nu)
                if carried and kind == ZERO and scope == STATE:
                    for j in range(N):
                        cv[j] = (1 - reset[j]) * cv[j]
                _emit(
                    *(t, b, r, nu, indptr, indices, values, weight, in_ptr, in_idx),
                    *(g_weight, g_bias, g_active, g_current),
                )
                if recurrent:
                    _emit_recurrent(t, b, r, nu, out_ptr, out_idx, g_rec_weight, g_rec_bias, g_rec0)
