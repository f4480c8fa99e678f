"""Backward kernel that replays, for neurons whose adjoint is linear (see linear.py): a chunk of steps is replayed,
becomes what enters the adjoint at each step, and is swept, all in rows that stay in cache.

Where the membrane was kept there is nothing to replay. A gradient of the spikes that comes as a product of two
matrices is multiplied here, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from ...core.backend import CHUNK
from .bits import HAS_AVX512
from .jit import kernel
from .linear import is_linear, sweep
from .multiply import multiply_kernel
from .outgoing import add_all, block_rows, deliver
from .rows import (
    DISTANCE,
    IN,
    MEM,
    REC,
    RESET,
    ROWS,
    SYN,
    SYNAPTIC,
    THRESHOLD,
    Code,
    V,
    add_rows,
    advance_kernel,
    copy_row,
    fill_rows,
    from_bias,
    is_plain,
    load2,
    load3,
    plain_step,
    shared,
    store2,
)
from .surrogate import surrogate_row

OWN_ROWS = ROWS + 8
"""Rows of the kernel's own: those of a step, and two each, for lam and nu, of what flows to the next step back, what it
decays by, their sums for the bias, whose gradient so costs no pass of its own, and the sums of a sample."""

PHI, ADJOINT = CHUNK, 2 * CHUNK
"""Rows of the kernel's block: for each step of a chunk u - threshold, the surrogate there, and from the last row down
the adjoint, of as many chunks as there is room for: these are delivered together."""


def replays_linear(code: Code, columns: int) -> bool:
    """Whether ``backward_replay_linear_kernel`` knows this neuron; a chunk of such rows has to stay in cache."""
    return is_linear(code) and bool(code[6]) and block_rows(columns) >= CHUNK


@kernel(part=True)
def currents(block, start, stop, b, T, current, rows, N, indptr, indices, values, weight):  # type: ignore[no-untyped-def]
    """``block[t - start]``: what comes to the N neurons of sample b at the steps start..stop."""
    still = current.shape[0] == 1
    for t in range(start, stop):
        k, r = np.uint64(t - start), b * T + t
        if indptr.shape[0] > 0:
            from_bias(block.shape[1], (block, k, rows))
            # as the forward calls it, so that it is compiled once
            add_rows(block, t - start, weight, indices, values, indptr[r], indptr[r + 1])
        else:
            at, sample = np.uint64(0 if still else t), np.uint64(b)
            for j in range(N):
                block[k, j] = current[at, sample, j]


@cache
def backward_replay_linear_kernel(code: Code) -> Callable[..., Any]:
    """The backward that replays, for a linear adjoint; arguments as of ``backward_replay`` where they share names."""
    member, subtracts = shared(code)
    return partial(_backward_replay_linear_kernel(member), subtracts)


@cache
def _backward_replay_linear_kernel(code: Code) -> Callable[..., Any]:
    synapse, plain, advance, step = code[1], is_plain(code), advance_kernel(code), plain_step(code[1])
    multiply = multiply_kernel(HAS_AVX512)

    @kernel()
    def backward_replay_linear(  # type: ignore[no-untyped-def]
        subtracts,  # whether a reset by subtraction is one
        first,
        last,
        T,
        derivative,
        params,
        checkpoints,
        current,
        bias,
        mem,  # (T, B, N) or empty
        incoming,
        active,
        arriving,
        product,  # (T, B, K), the panels of (K, N): a gradient of spikes, not multiplied yet, or empty
        lam_state,
        ci_state,
        outgoing,
        block,  # (ADJOINT + CHUNK or more, N padded), zeros beyond column N
        flat,  # the same in one row
        rows,  # its own, zeros: OWN_ROWS
    ):
        window, surrogate, first_param, second_param = derivative
        v_checkpoints, i_checkpoints = checkpoints
        act_ptr, act_idx = active
        indptr, indices, values, weight = incoming[0], incoming[1], incoming[2], incoming[3]
        g_out, g_spikes, g_mem = arriving
        g_above, panels = product
        N, width = lam_state.shape[1], block.shape[1]
        fill_rows(rows, params, bias, subtracts)
        x, none, v, i, reset = rows[IN, :N], rows[REC, :N], rows[V, :N], rows[SYNAPTIC, :N], rows[RESET, :N]
        distance = rows[DISTANCE, :N]
        flow, decay = rows[ROWS : ROWS + 2], rows[ROWS + 2 : ROWS + 4]
        sums, summed = rows[ROWS + 4 : ROWS + 6], rows[ROWS + 6 :]
        g_weight, g_bias, g_active, g_current, g_rec_weight, g_rec_bias, g_rec0 = outgoing
        unbiased = (g_weight, g_bias[:0], g_active, g_current, g_rec_weight, g_rec_bias, g_rec0)
        copy_row(decay[0, :N], params[MEM])
        copy_row(decay[1, :N], params[SYN])
        has_out, has_spikes, has_mem = g_out.shape[0] > 0, g_spikes.shape[0] > 0, g_mem.shape[0] > 0
        has_product, keeps_mem = panels.shape[0] > 0, mem.shape[0] > 0
        threshold = params[THRESHOLD]
        # of one current for all steps the gradient is the sum of each sample, and nobody wants the rows of nu
        once = g_current.shape[0] == 1 and indptr.shape[0] == 0
        adjoint, membrane, synaptic = np.int64(block.shape[0]), np.int64(0), np.int64(1)
        high = np.int64(last * T)  # of the rows b * T + t whose adjoint is in the block
        for b in range(last - 1, first - 1, -1):
            copy_row(flow[0, :N], lam_state[b])
            copy_row(flow[1, :N], ci_state[b])
            if once:
                summed[:] = 0
            for chunk in range((T - 1) // CHUNK, -1, -1):
                start, stop = chunk * CHUNK, min(T, chunk * CHUNK + CHUNK)
                sample = np.uint64(b)
                if adjoint - (stop - start) < ADJOINT:
                    if not once:
                        deliver(block, adjoint, b * T + stop, high, T, incoming, unbiased)
                    adjoint, high = np.int64(block.shape[0]), np.int64(b * T + stop)
                adjoint -= stop - start
                if keeps_mem:
                    for t in range(start, stop):
                        k, at = np.uint64(t - start), np.uint64(t)
                        for j in range(N):
                            block[k, j] = mem[at, sample, j] - threshold[j]
                else:
                    load3(v, v_checkpoints, chunk, b)
                    if synapse:
                        load3(i, i_checkpoints, chunk, b)
                    currents(block, start, stop, b, T, current, rows, N, indptr, indices, values, weight)
                    for t in range(start, stop):
                        if plain:
                            at = np.uint64(t - start)
                            step(width, (rows, block, at, block, at))
                        else:
                            load2(x, block, t - start)
                            advance(params, x, none, v, i, reset, distance)
                            store2(block, t - start, distance)
                size, at_phi = (stop - start) * width, PHI * width
                slopes = flat[at_phi : at_phi + size]
                surrogate_row(surrogate, first_param, second_param, window, flat[:size], slopes)
                if has_product:
                    multiply(g_above, panels, start, stop, b, block, adjoint, np.int64(PHI))
                for t in range(start, stop):
                    phi, k, at = np.uint64(PHI + t - start), np.uint64(adjoint + t - start), np.uint64(t)
                    if has_spikes:
                        for j in range(N):
                            block[k, j] = block[phi, j] * g_spikes[at, sample, j]
                    elif not has_product:
                        for j in range(N):
                            block[k, j] = 0
                    if has_mem:
                        for j in range(N):
                            block[k, j] += g_mem[at, sample, j]
                    if has_out:
                        r = b * T + t
                        for a in range(act_ptr[r], act_ptr[r + 1]):
                            neuron = np.uint64(act_idx[a])
                            block[k, neuron] += block[phi, neuron] * g_out[a]
                to, end = summed if once else sums, adjoint + stop - start
                sweep(block, adjoint, end, decay, flow, to, membrane)
                if synapse:
                    sweep(block, adjoint, end, decay, flow, to, synaptic)
            if once:
                for j in range(N):
                    g_current[0, b, j] = summed[1 if synapse else 0, j]
            copy_row(lam_state[b], flow[0])
            copy_row(ci_state[b], flow[1])
        if not once and high > first * T:
            deliver(block, adjoint, np.int64(first * T), high, T, incoming, unbiased)
        if g_bias.shape[0] > 0:
            add_all(g_bias, sums, synaptic if synapse else membrane, synaptic)

    return backward_replay_linear
