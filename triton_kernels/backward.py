"""Backward of ``spiking_layer``: one launch replays each chunk from its checkpoint and walks it back."""

import triton
import triton.language as tl

from .forward import input_current, recurrent_current
from .neuron import adjoint, load_params, step
from .surrogates import surrogate_grad


@triton.jit
def add_recurrent_grad(g_s, nu_ptr, rec_weight_ptr, row, ROWS, N, cols, mask, TILE: tl.constexpr):
    """``g_s`` plus W_rec^T nu of the step after: a product with all ROWS of W_rec, TILE of them at a time."""
    for first in range(0, ROWS, TILE):
        rows = first + tl.arange(0, TILE)
        nu = tl.load(nu_ptr + row * ROWS + rows, mask=rows < ROWS, other=0.0)
        weight = tl.load(
            rec_weight_ptr + rows[:, None] * N + cols[None, :],
            mask=(rows < ROWS)[:, None] & mask[None, :],
            other=0.0,
        )
        g_s += tl.sum(nu[:, None] * weight, axis=0)
    return g_s


@triton.jit(do_not_specialize=["T", "B"])
def spiking_layer_backward(
    x_ptr,  # inputs as in the forward
    in_words_ptr,
    weight_ptr,
    bias_ptr,
    rec_weight_t_ptr,  # (N, N), row m holds what spike m adds; or None
    rec_weight_ptr,  # (N, N), its transpose
    rec_bias_ptr,
    rec0_ptr,
    words_ptr,  # (T, B, n_words), the layer's spikes; read by recurrent layers only
    v_checkpoint_ptr,  # (chunks, B, N)
    i_checkpoint_ptr,
    params_ptr,  # (5, N)
    g_spikes_ptr,  # (T, B, N) or None
    g_mem_ptr,  # (T, B, N) or None
    g_v_ptr,  # (B, N) or None
    g_i_ptr,  # (B, N) or None
    scratch_ptr,  # (2 or 3, CHUNK, B, N): membranes before the reset, before the step; the drive if d_params
    nu_ptr,  # out (T, B, N): gradient of the input current
    d_v0_ptr,  # out (B, N)
    d_i0_ptr,  # out (B, N) or None
    d_params_ptr,  # out (5, B, N) or None
    T,
    B,
    N,
    in_words,
    n_words,
    WINDOW: tl.constexpr,  # None: exact
    KIND: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    STATIC_INPUT: tl.constexpr,
    UPDATE: tl.constexpr,
    SYNAPSE: tl.constexpr,
    RESET: tl.constexpr,
    TIMING: tl.constexpr,
    SCOPE: tl.constexpr,
    ATTACHED: tl.constexpr,
    SPIKING: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (B, blocks of N); recurrent layers need all of N in one block."""
    b = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    mem, syn, threshold, leak, reset_value = load_params(params_ptr, N, cols, mask)
    rows = B.to(tl.int64)  # rows of a step: T * B * N may pass 2^31
    plane = CHUNK * rows * N
    zero = tl.zeros_like(mem)
    g_v, g_i, rec, drive, phi = zero, zero, zero, zero, zero
    if g_v_ptr is not None:
        g_v = tl.load(g_v_ptr + b * N + cols, mask=mask, other=0.0)
    if g_i_ptr is not None:
        g_i = tl.load(g_i_ptr + b * N + cols, mask=mask, other=0.0)
    sum_mem, sum_syn, sum_threshold, sum_leak, sum_reset_value = zero, zero, zero, zero, zero

    chunks = (T + CHUNK - 1) // CHUNK
    for k in range(chunks):
        chunk = chunks - 1 - k
        start = chunk * CHUNK
        steps = tl.minimum(T - start, CHUNK)
        v = tl.load(v_checkpoint_ptr + (chunk * rows + b) * N + cols, mask=mask, other=0.0)
        i = zero
        if SYNAPSE:
            i = tl.load(i_checkpoint_ptr + (chunk * rows + b) * N + cols, mask=mask, other=0.0)
        for j in range(steps):
            row = (start + j) * rows + b
            slot = (j * rows + b) * N + cols
            x = input_current(
                x_ptr, in_words_ptr, weight_ptr, bias_ptr, row, b, in_words, N, cols, mask, v, STATIC_INPUT
            )
            if rec_weight_ptr is not None:
                rec = recurrent_current(
                    start + j,
                    rec_weight_t_ptr,
                    rec_bias_ptr,
                    rec0_ptr,
                    words_ptr,
                    row,
                    b,
                    rows,
                    n_words,
                    N,
                    cols,
                    mask,
                    v,
                )
            tl.store(scratch_ptr + plane + slot, v, mask=mask)
            u, _s, v, i, drive = step(
                x,
                rec,
                v,
                i,
                mem,
                syn,
                threshold,
                leak,
                reset_value,
                rec_weight_ptr is not None,
                UPDATE,
                SYNAPSE,
                RESET,
                TIMING,
                SCOPE,
                SPIKING,
            )
            tl.store(scratch_ptr + slot, u, mask=mask)
            if d_params_ptr is not None:
                tl.store(scratch_ptr + 2 * plane + slot, drive, mask=mask)
        tl.debug_barrier()  # scratch may come back to other threads than wrote it

        for back in range(steps):
            j = steps - 1 - back
            row = (start + j) * rows + b
            slot = (j * rows + b) * N + cols
            u = tl.load(scratch_ptr + slot, mask=mask, other=0.0)
            v_prev = tl.load(scratch_ptr + plane + slot, mask=mask, other=0.0)
            if d_params_ptr is not None:
                drive = tl.load(scratch_ptr + 2 * plane + slot, mask=mask, other=0.0)
            if g_mem_ptr is not None:
                g_v += tl.load(g_mem_ptr + row * N + cols, mask=mask, other=0.0)
            g_s = zero
            if SPIKING:
                if g_spikes_ptr is not None:
                    g_s = tl.load(g_spikes_ptr + row * N + cols, mask=mask, other=0.0)
                if rec_weight_ptr is not None:
                    tl.debug_barrier()  # nu of the step after was written by other threads
                    if start + j + 1 < T:
                        after = row + rows
                        g_s = add_recurrent_grad(g_s, nu_ptr, rec_weight_ptr, after, N, N, cols, mask, TILE)
                distance = u - threshold
                phi = surrogate_grad(distance, KIND, P0, P1)
                if WINDOW is not None:
                    phi = tl.where(tl.abs(distance) < WINDOW, phi, zero)
            nu, g_v, g_i, d_mem, d_syn, d_threshold, d_leak, d_reset_value = adjoint(
                g_s,
                g_v,
                g_i,
                phi,
                u,
                v_prev,
                drive,
                mem,
                syn,
                threshold,
                leak,
                reset_value,
                UPDATE,
                SYNAPSE,
                RESET,
                TIMING,
                SCOPE,
                ATTACHED,
                SPIKING,
            )
            tl.store(nu_ptr + row * N + cols, nu, mask=mask)
            if d_params_ptr is not None:
                sum_mem += d_mem
                sum_syn += d_syn
                sum_threshold += d_threshold
                sum_leak += d_leak
                sum_reset_value += d_reset_value
        tl.debug_barrier()  # the next chunk's replay overwrites the scratch

    tl.store(d_v0_ptr + b * N + cols, g_v, mask=mask)
    if SYNAPSE:
        tl.store(d_i0_ptr + b * N + cols, g_i, mask=mask)
    if d_params_ptr is not None:
        slot = b * N + cols
        tl.store(d_params_ptr + slot, sum_mem, mask=mask)
        tl.store(d_params_ptr + rows * N + slot, sum_syn, mask=mask)
        tl.store(d_params_ptr + 2 * rows * N + slot, sum_threshold, mask=mask)
        tl.store(d_params_ptr + 3 * rows * N + slot, sum_leak, mask=mask)
        tl.store(d_params_ptr + 4 * rows * N + slot, sum_reset_value, mask=mask)
