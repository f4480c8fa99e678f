"""Forward of ``spiking_layer``: one launch walks all steps with the state in registers."""

import triton
import triton.language as tl

from .neuron import load_params, step
from .packed import gather_rows, store_packed


@triton.jit
def input_current(
    x_ptr,
    in_words_ptr,
    weight_ptr,
    bias_ptr,
    row,
    b,
    in_words,
    N,
    cols,
    mask,
    like,
    STATIC_INPUT: tl.constexpr,
):
    """The input current of one row ``t * B + b``: read, or summed over the rows of W^T whose input spiked."""
    if x_ptr is not None:
        x_row = row
        if STATIC_INPUT:
            x_row = b
        x = tl.load(x_ptr + x_row * N + cols, mask=mask, other=0.0)
    else:
        x = tl.zeros_like(like)
        if bias_ptr is not None:
            x = tl.load(bias_ptr + cols, mask=mask, other=0.0)
        x = gather_rows(x, in_words_ptr + row * in_words, in_words, weight_ptr, N, cols, mask)
    return x


@triton.jit
def recurrent_current(
    t, rec_weight_ptr, rec_bias_ptr, rec0_ptr, words_ptr, row, b, B, n_words, N, cols, mask, like
):
    """What the layer's own spikes of the step before feed back; at the first step it is given."""
    if t == 0:
        rec = tl.load(rec0_ptr + b * N + cols, mask=mask, other=0.0)
    else:
        rec = tl.zeros_like(like)
        if rec_bias_ptr is not None:
            rec = tl.load(rec_bias_ptr + cols, mask=mask, other=0.0)
        rec = gather_rows(rec, words_ptr + (row - B) * n_words, n_words, rec_weight_ptr, N, cols, mask)
    return rec


@triton.jit(do_not_specialize=["T", "B"])
def spiking_layer_forward(
    x_ptr,  # (T, B, N), (B, N) if STATIC_INPUT, or None: then words, weights and bias make the current
    in_words_ptr,  # (T, B, in_words)
    weight_ptr,  # (M, N)
    bias_ptr,  # (N,) or None
    rec_weight_ptr,  # (N, N), row m holds what spike m adds; or None
    rec_bias_ptr,
    rec0_ptr,  # (B, N)
    v0_ptr,  # (B, N)
    i0_ptr,  # (B, N) or None
    params_ptr,  # (5, N)
    words_ptr,  # out (T, B, n_words) or None
    spikes_ptr,  # out (T, B, N) or None
    mem_ptr,  # out (T, B, N) or None
    v_ptr,  # out (B, N)
    i_ptr,  # out (B, N) or None
    v_checkpoint_ptr,  # out (chunks, B, N) or None
    i_checkpoint_ptr,
    near_ptr,  # out (B, blocks) int64 or None: neuron-steps within WINDOW of the threshold
    T,
    B,
    N,
    in_words,
    n_words,
    WINDOW: tl.constexpr,
    STATIC_INPUT: tl.constexpr,
    UPDATE: tl.constexpr,
    SYNAPSE: tl.constexpr,
    RESET: tl.constexpr,
    TIMING: tl.constexpr,
    SCOPE: tl.constexpr,
    SPIKING: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (B, blocks of N); recurrent layers need all of N in one block."""
    b = tl.program_id(0).to(tl.int64)
    first_col = tl.program_id(1) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    mask = cols < N
    mem, syn, threshold, leak, reset_value = load_params(params_ptr, N, cols, mask)
    v = tl.load(v0_ptr + b * N + cols, mask=mask, other=0.0)
    i = tl.zeros_like(v)
    if SYNAPSE:
        i = tl.load(i0_ptr + b * N + cols, mask=mask, other=0.0)
    near = tl.zeros([BLOCK_N], dtype=tl.int64)
    rec = tl.zeros_like(v)

    row = b  # t * B + b, in int64: T * B * N may pass 2^31
    checkpoint = b
    for start in range(0, T, CHUNK):
        if v_checkpoint_ptr is not None:
            tl.store(v_checkpoint_ptr + checkpoint * N + cols, v, mask=mask)
            if SYNAPSE:
                tl.store(i_checkpoint_ptr + checkpoint * N + cols, i, mask=mask)
        checkpoint += B
        for t in range(start, tl.minimum(start + CHUNK, T)):
            x = input_current(
                x_ptr, in_words_ptr, weight_ptr, bias_ptr, row, b, in_words, N, cols, mask, v, STATIC_INPUT
            )
            if rec_weight_ptr is not None:
                tl.debug_barrier()  # the words of the step before were written by other threads
                rec = recurrent_current(
                    t, rec_weight_ptr, rec_bias_ptr, rec0_ptr, words_ptr, row, b, B, n_words, N, cols, mask, v
                )
            u, s, v, i, _drive = step(
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
            if near_ptr is not None:
                near += ((tl.abs(u - threshold) < WINDOW) & mask).to(tl.int64)
            if words_ptr is not None:
                store_packed(words_ptr + row * n_words, tl.where(mask, s, 0.0), first_col, n_words, BLOCK_N)
            if spikes_ptr is not None:
                tl.store(spikes_ptr + row * N + cols, s, mask=mask)
            if mem_ptr is not None:
                tl.store(mem_ptr + row * N + cols, v, mask=mask)
            row += B

    tl.store(v_ptr + b * N + cols, v, mask=mask)
    if SYNAPSE:
        tl.store(i_ptr + b * N + cols, i, mask=mask)
    if near_ptr is not None:
        tl.store(near_ptr + b * tl.num_programs(1) + tl.program_id(1), tl.sum(near, axis=0))
