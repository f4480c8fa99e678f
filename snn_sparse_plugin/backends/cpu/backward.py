"""Backward kernel over the active list: between active entries the adjoint only decays. Linear ones: see linear.py.

The adjoint runs back in time per sample, in a few vectors of N values:

    mu = dE/dv_t        lam = dE/du_t        nu = dE/d(input current at t)
    ci                  what step t + 1 sends to the synaptic current of step t
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from .jit import kernel
from .outgoing import deliver, deliver_recurrent
from .rows import (
    DECAY,
    DELAYED,
    EULER,
    IMMEDIATE,
    MEM,
    RESET_VALUE,
    STATE,
    SUBTRACT,
    SUM,
    SYN,
    THRESHOLD,
    VALUE,
    ZERO,
    Code,
    copy_row,
    dot,
    store2,
)


@kernel(forceinline=True)
def input_grad(code, params, lam, ci, nu):  # type: ignore[no-untyped-def]
    """nu_t from lam_t, and what flows to the synaptic current of step t - 1."""
    N = lam.shape[0]
    one = lam.dtype.type(1)
    mem, syn = params[MEM], params[SYN]
    if code[0] == DECAY:
        if code[1]:
            for j in range(N):
                nu[j] = lam[j] + ci[j]
            for j in range(N):
                ci[j] = syn[j] * nu[j]
        else:
            copy_row(nu, lam)
    elif code[0] == EULER:
        for j in range(N):
            ci[j] = mem[j] * lam[j] + (one - syn[j]) * ci[j]
        copy_row(nu, ci)
    else:
        for j in range(N):
            nu[j] = mem[j] * lam[j]


@kernel(forceinline=True)
def decay_back(code, params, lam):  # type: ignore[no-untyped-def]
    """lam_t becomes what flows to the membrane of step t - 1, in place."""
    one = lam.dtype.type(1)
    mem = params[MEM]
    if code[0] == DECAY:
        for j in range(lam.shape[0]):
            lam[j] = mem[j] * lam[j]
    else:
        for j in range(lam.shape[0]):
            lam[j] = (one - mem[j]) * lam[j]


@cache
def backward_active_kernel(code: Code) -> Callable[..., Any]:
    """The backward over the active list, for one member of the neuron family."""
    _, _, kind, timing, scope, attached, _, recurrent = code

    @kernel()
    def backward_active(  # type: ignore[no-untyped-def]
        first,
        last,
        T,
        params,
        v0,
        rec_weight,
        incoming,  # what came in and spiked, see outgoing.py
        active,
        act_x,  # membrane - threshold there
        phi,  # the surrogate's derivative there
        block,  # space for rows of nu, zero beyond column N
        arriving,  # gradients of active entries, of spikes and of the membrane: empty where there is none
        lam_state,  # (B, N): gradient of the final state in, of the initial state out
        ci_state,
        outgoing,
        rows,  # its own, zeros: of LINEAR_ROWS two
    ):
        act_ptr, act_idx = active
        out_ptr, out_idx = incoming[6], incoming[7]
        g_out, g_spikes, g_mem = arriving
        N = v0.shape[1]
        dtype = v0.dtype
        zero = dtype.type(0)
        threshold, reset_value = params[THRESHOLD], params[RESET_VALUE]
        mu, nu = rows[0, :N], rows[1, :N]
        until = last * T
        has_out, has_spikes, has_mem = g_out.shape[0] > 0, g_spikes.shape[0] > 0, g_mem.shape[0] > 0
        for b in range(last - 1, first - 1, -1):
            lam, ci = lam_state[b], ci_state[b]
            for t in range(T - 1, -1, -1):
                r = b * T + t
                k = r % block.shape[0]
                if has_mem:
                    at, sample = np.uint64(t), np.uint64(b)
                    for j in range(N):
                        lam[j] += g_mem[at, sample, j]
                if attached:
                    copy_row(mu, lam)
                if timing == IMMEDIATE and kind in (VALUE, ZERO):
                    for e in range(out_ptr[r], out_ptr[r + 1]):
                        lam[out_idx[e]] = 0
                for a in range(act_ptr[r], act_ptr[r + 1]):
                    j = act_idx[a]
                    g = g_out[a] if has_out else zero
                    if has_spikes:
                        g += g_spikes[t, b, j]
                    if recurrent and t < T - 1:
                        g += dot(rec_weight, j, nu)
                    if attached:
                        if kind == SUBTRACT:
                            g -= threshold[j] * mu[j]
                        elif kind == VALUE:
                            g += (reset_value[j] - (act_x[a] + threshold[j])) * mu[j]
                        elif kind == ZERO:
                            g -= (act_x[a] + threshold[j]) * mu[j]
                    lam[j] += phi[a] * g
                # what spiked at t - 1 passes nothing on to its state or, with scope sum, to anything
                if timing == DELAYED and kind == ZERO and scope == SUM:
                    if t > 0:
                        for e in range(out_ptr[r - 1], out_ptr[r]):
                            lam[out_idx[e]] = 0
                    else:
                        for j in range(N):
                            lam[j] = zero if v0[b, j] - threshold[j] > zero else lam[j]
                input_grad(code, params, lam, ci, nu)
                store2(block, k, nu)
                decay_back(code, params, lam)
                if timing == DELAYED and kind == ZERO and scope == STATE:
                    if t > 0:
                        for e in range(out_ptr[r - 1], out_ptr[r]):
                            lam[out_idx[e]] = 0
                    else:
                        for j in range(N):
                            lam[j] = zero if v0[b, j] - threshold[j] > zero else lam[j]
                if k == 0 or r == first * T:
                    deliver(block, r % block.shape[0], r, until, T, incoming, outgoing)
                    if recurrent:
                        deliver_recurrent(block, r % block.shape[0], r, until, T, incoming, outgoing)
                    until = r

    return backward_active
