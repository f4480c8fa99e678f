"""Backward kernel that replays, for neurons whose adjoint is linear (see linear.py): the replay of a chunk writes what
enters the adjoint at each step straight into the block, which is then swept at once.

Where the membrane was kept there is nothing to replay. A gradient of the spikes that comes as a product of two small
matrices is multiplied here, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ...core.backend import CHUNK
from .bits import LANES
from .jit import kernel
from .lanes import fma, load, splat, store, zeros
from .linear import is_linear, sweep
from .outgoing import add_all, block_rows, deliver
from .rows import MEM, SYN, THRESHOLD, Code, add_rows, advance_kernel, copy_row, load3, surrogate_row


def replays_linear(code: Code, columns: int) -> bool:
    """Whether ``backward_replay_linear_kernel`` knows this neuron; a chunk of such rows has to fit into a block."""
    return is_linear(code) and bool(code[6]) and block_rows(columns) >= CHUNK


@cache
def backward_replay_linear_kernel(code: Code) -> Callable[..., Any]:
    """The backward that replays, for a linear adjoint; arguments as of ``backward_replay`` where they share names."""
    synapse, advance = code[1], advance_kernel(code)

    @kernel()
    def backward_replay_linear(  # type: ignore[no-untyped-def]
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
        product,  # (T, B, K), (K, N padded): a gradient of spikes, not multiplied yet, or empty
        lam_state,
        ci_state,
        outgoing,
        block,
    ):
        window, surrogate, first_param, second_param = derivative
        v_checkpoints, i_checkpoints = checkpoints
        act_ptr, act_idx = active
        indptr, indices, values, weight = incoming[0], incoming[1], incoming[2], incoming[3]
        g_out, g_spikes, g_mem = arriving
        g_above, above = product
        N, width, rows = lam_state.shape[1], block.shape[1], block.shape[0]
        dtype = lam_state.dtype
        zero = dtype.type(0)
        x_row = np.zeros((1, width), dtype)
        x, none = x_row[0, :N], np.zeros(N, dtype)
        v, i, reset = np.empty(N, dtype), np.zeros(N, dtype), np.zeros(N, dtype)
        distance, phi = np.zeros(N, dtype), np.zeros(N, dtype)
        flow, decay = np.zeros((2, width), dtype), np.zeros((2, width), dtype)
        # of lam and nu: summed on the way, the gradient of the bias costs no pass of its own
        sums = np.zeros((2, width), dtype)
        g_weight, g_bias, g_active, g_current, g_rec_weight, g_rec_bias, g_rec0 = outgoing
        unbiased = (g_weight, g_bias[:0], g_active, g_current, g_rec_weight, g_rec_bias, g_rec0)
        copy_row(decay[0, :N], params[MEM])
        copy_row(decay[1, :N], params[SYN])
        has_out, has_spikes, has_mem = g_out.shape[0] > 0, g_spikes.shape[0] > 0, g_mem.shape[0] > 0
        has_product, keeps_mem = above.shape[0] > 0, mem.shape[0] > 0
        from_events, still = indptr.shape[0] > 0, current.shape[0] == 1
        threshold = params[THRESHOLD]
        # of one current for all steps the gradient is the sum of each sample, and nobody wants the rows of nu
        once, summed = g_current.shape[0] == 1 and not from_events, np.zeros((2, width), dtype)
        for b in range(last - 1, first - 1, -1):
            copy_row(flow[0, :N], lam_state[b])
            copy_row(flow[1, :N], ci_state[b])
            if once:
                summed[:] = 0
            for chunk in range((T - 1) // CHUNK, -1, -1):
                start, stop = chunk * CHUNK, min(T, chunk * CHUNK + CHUNK)
                if not keeps_mem:
                    load3(v, v_checkpoints, chunk, b)
                    if synapse:
                        load3(i, i_checkpoints, chunk, b)
                if has_product:
                    multiply(g_above, above, start, stop, b, block, b * T + start)
                for t in range(start, stop):
                    r = b * T + t
                    k, at, sample = np.uint64(r % rows), np.uint64(t), np.uint64(b)
                    if keeps_mem:
                        for j in range(N):
                            distance[j] = mem[at, sample, j] - threshold[j]
                    else:
                        if from_events:
                            copy_row(x, bias)
                            add_rows(x_row, 0, weight, indices, values, indptr[r], indptr[r + 1])
                        else:
                            load3(x, current, 0 if still else t, b)
                        advance(params, x, none, v, i, reset, distance)
                    surrogate_row(surrogate, first_param, second_param, window, distance, phi)
                    if has_product:
                        for j in range(N):
                            block[k, j] = phi[j] * block[k, j]
                    elif has_spikes:
                        for j in range(N):
                            block[k, j] = phi[j] * g_spikes[at, sample, j]
                    else:
                        for j in range(N):
                            block[k, j] = zero
                    if has_mem:
                        for j in range(N):
                            block[k, j] += g_mem[at, sample, j]
                    if has_out:
                        for a in range(act_ptr[r], act_ptr[r + 1]):
                            block[k, np.uint64(act_idx[a])] += phi[act_idx[a]] * g_out[a]
                # the rows of a chunk lie together in the block, but for those beyond its end
                high, low = b * T + stop, b * T + start
                while high > low:
                    begin = max(low, (high - 1) // rows * rows)
                    at_row = begin % rows
                    to = summed if once else sums
                    sweep(block, at_row, at_row + high - begin, decay, flow, to, 0)
                    if synapse:
                        sweep(block, at_row, at_row + high - begin, decay, flow, to, 1)
                    if not once:
                        deliver(block, begin, high, T, incoming, unbiased)
                    high = begin
            if once:
                for j in range(N):
                    g_current[0, b, j] = summed[1 if synapse else 0, j]
            copy_row(lam_state[b], flow[0])
            copy_row(ci_state[b], flow[1])
        if g_bias.shape[0] > 0:
            add_all(g_bias, sums, 1 if synapse else 0, 1)

    return backward_replay_linear


@kernel(forceinline=True)
def multiply(nu, weight, start, stop, b, block, row):  # type: ignore[no-untyped-def]
    """``block[(row + t - start) % rows] = nu[t, b] @ weight`` for the steps start..stop, four at a time."""
    width, rows, last = np.uint64(block.shape[1]), block.shape[0], stop - 1
    b = np.uint64(b)
    for t in range(start, stop, 4):
        # steps beyond the last are the last one again
        p, q = np.uint64(t), np.uint64(min(t + 1, last))
        r, s = np.uint64(min(t + 2, last)), np.uint64(min(t + 3, last))
        j = np.uint64(0)
        while j < width:
            w, x, y, z = zeros(block), zeros(block), zeros(block), zeros(block)
            for i in range(weight.shape[0]):
                k = np.uint64(i)
                of = load(weight, k, j)
                w, x = fma(splat(nu[p, b, k]), of, w), fma(splat(nu[q, b, k]), of, x)
                y, z = fma(splat(nu[r, b, k]), of, y), fma(splat(nu[s, b, k]), of, z)
            store(block, np.uint64((row + np.int64(p) - start) % rows), j, w)
            store(block, np.uint64((row + np.int64(q) - start) % rows), j, x)
            store(block, np.uint64((row + np.int64(r) - start) % rows), j, y)
            store(block, np.uint64((row + np.int64(s) - start) % rows), j, z)
            j += np.uint64(LANES)
