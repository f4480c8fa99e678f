"""Forward and backward of neurons given by equations: one launch walks all steps, the states in registers."""

import triton
import triton.language as tl

from .backward import add_recurrent_grad
from .forward import input_current, recurrent_current
from .packed import store_packed
from .program import execute, execute_back, load_rows, select, store_rows


@triton.jit
def all_currents(
    t,
    x_ptr,  # (T, B, C * N) and so on: the currents of each input, one input after the other
    in_words_ptr,
    weight_ptr,
    bias_ptr,
    rec_weight_ptr,
    rec_bias_ptr,
    rec0_ptr,
    words_ptr,
    row,
    b,
    B,
    in_words,
    n_words,
    N,
    cols,
    mask,
    like,
    INPUTS: tl.constexpr,
    STATIC_INPUT: tl.constexpr,
):
    """The current of each input, then of each recurrent one."""
    currents = ()
    for c in tl.static_range(INPUTS):
        x = input_current(
            x_ptr,
            in_words_ptr,
            weight_ptr,
            bias_ptr,
            row,
            b,
            in_words,
            INPUTS * N,
            c * N + cols,
            mask,
            like,
            STATIC_INPUT,
        )
        currents = currents + (x,)
    for c in tl.static_range(INPUTS):
        rec = tl.zeros_like(like)
        if rec_weight_ptr is not None:
            rec = recurrent_current(
                t,
                rec_weight_ptr,
                rec_bias_ptr,
                rec0_ptr,
                words_ptr,
                row,
                b,
                B,
                n_words,
                INPUTS * N,
                c * N + cols,
                mask,
                like,
            )
        currents = currents + (rec,)
    return currents


@triton.jit(do_not_specialize=["T", "B"])
def program_forward(
    x_ptr,  # inputs and outputs as in spiking_layer_forward
    in_words_ptr,
    weight_ptr,
    bias_ptr,
    rec_weight_ptr,
    rec_bias_ptr,
    rec0_ptr,
    v0_ptr,  # (K, B, N): all states
    i0_ptr,  # None, as all that follow with this letter
    params_ptr,  # (P, N)
    words_ptr,
    spikes_ptr,
    mem_ptr,
    v_ptr,  # out (K, B, N)
    i_ptr,
    v_checkpoint_ptr,  # out (chunks, K, B, N) or None
    i_checkpoint_ptr,
    near_ptr,
    T,
    B,
    N,
    in_words,
    n_words,
    WINDOW: tl.constexpr,
    STATIC_INPUT: tl.constexpr,
    PROGRAM: tl.constexpr,
    CONSTANTS: tl.constexpr,
    RESULTS: tl.constexpr,
    STATES: tl.constexpr,
    INPUTS: tl.constexpr,
    PARAMS: tl.constexpr,
    MEMBRANE: tl.constexpr,
    SPIKES: tl.constexpr,  # registers of the output and of what the window looks at, None for a readout
    SITE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (B, blocks of N); recurrent layers need all of N in one block."""
    b = tl.program_id(0).to(tl.int64)
    first_col = tl.program_id(1) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    mask = cols < N
    rows = B.to(tl.int64)
    states = load_rows(v0_ptr, b, rows, N, cols, mask, STATES, 0.0)
    params = load_rows(params_ptr, 0, 1, N, cols, mask, PARAMS, 1.0)
    near = tl.zeros([BLOCK_N], dtype=tl.int64)
    like = states[0]
    row = b
    for start in range(0, T, CHUNK):
        if v_checkpoint_ptr is not None:
            at = (start // CHUNK) * STATES * rows + b
            store_rows(v_checkpoint_ptr, at, rows, N, cols, mask, states, STATES)
        for t in range(start, tl.minimum(start + CHUNK, T)):
            if rec_weight_ptr is not None:
                tl.debug_barrier()  # the words of the step before were written by other threads
            currents = all_currents(
                t,
                x_ptr,
                in_words_ptr,
                weight_ptr,
                bias_ptr,
                rec_weight_ptr,
                rec_bias_ptr,
                rec0_ptr,
                words_ptr,
                row,
                b,
                B,
                in_words,
                n_words,
                N,
                cols,
                mask,
                like,
                INPUTS,
                STATIC_INPUT,
            )
            regs = execute(states, currents, params, PROGRAM, CONSTANTS)
            states = select(regs, RESULTS)
            if near_ptr is not None:
                near += ((tl.abs(regs[SITE]) < WINDOW) & mask).to(tl.int64)
            if words_ptr is not None:
                s = tl.where(mask, (regs[SPIKES] > 0).to(tl.int32), 0)
                store_packed(words_ptr + row * n_words, s, first_col, n_words, BLOCK_N)
            if spikes_ptr is not None:
                tl.store(spikes_ptr + row * N + cols, regs[SPIKES], mask=mask)
            if mem_ptr is not None:
                tl.store(mem_ptr + row * N + cols, states[MEMBRANE], mask=mask)
            row += B
    store_rows(v_ptr, b, rows, N, cols, mask, states, STATES)
    if near_ptr is not None:
        tl.store(near_ptr + b * tl.num_programs(1) + tl.program_id(1), tl.sum(near, axis=0))


@triton.jit(do_not_specialize=["T", "B"])
def program_backward(
    x_ptr,  # as in spiking_layer_backward
    in_words_ptr,
    weight_ptr,
    bias_ptr,
    rec_weight_t_ptr,
    rec_weight_ptr,
    rec_bias_ptr,
    rec0_ptr,
    words_ptr,
    v_checkpoint_ptr,  # (chunks, K, B, N)
    i_checkpoint_ptr,
    params_ptr,
    g_spikes_ptr,
    g_mem_ptr,
    g_v_ptr,  # (K, B, N) or None
    g_i_ptr,
    scratch_ptr,  # (CHUNK, K + 2 C, B, N): states before each step, its currents
    nu_ptr,  # out (T, B, C * N)
    d_v0_ptr,  # out (K, B, N)
    d_i0_ptr,
    d_params_ptr,  # out (P, B, N) or None
    T,
    B,
    N,
    in_words,
    n_words,
    WINDOW: tl.constexpr,
    KIND: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    STATIC_INPUT: tl.constexpr,
    PROGRAM: tl.constexpr,
    BACKWARD: tl.constexpr,
    CONSTANTS: tl.constexpr,
    RESULTS: tl.constexpr,
    FROM_STATES: tl.constexpr,  # places of the adjoints of states, inputs and parameters
    FROM_INPUTS: tl.constexpr,
    FROM_PARAMS: tl.constexpr,
    STATES: tl.constexpr,
    INPUTS: tl.constexpr,
    PARAMS: tl.constexpr,
    MEMBRANE: tl.constexpr,
    SPIKING: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (B, blocks of N); recurrent layers need all of N in one block."""
    b = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    rows = B.to(tl.int64)
    params = load_rows(params_ptr, 0, 1, N, cols, mask, PARAMS, 1.0)
    like = tl.load(v_checkpoint_ptr + b * N + cols, mask=mask, other=0.0)
    zero = tl.zeros_like(like)
    carried = ()
    for k in tl.static_range(STATES):
        carried = carried + (zero,)
    if g_v_ptr is not None:
        carried = load_rows(g_v_ptr, b, rows, N, cols, mask, STATES, 0.0)
    sums = ()
    for k in tl.static_range(PARAMS):
        sums = sums + (zero,)
    KEPT: tl.constexpr = STATES + 2 * INPUTS

    chunks = (T + CHUNK - 1) // CHUNK
    for c in range(chunks):
        chunk = chunks - 1 - c
        start = chunk * CHUNK
        steps = tl.minimum(T - start, CHUNK)
        states = load_rows(v_checkpoint_ptr, chunk * STATES * rows + b, rows, N, cols, mask, STATES, 0.0)
        for j in range(steps):
            row = (start + j) * rows + b
            currents = all_currents(
                start + j,
                x_ptr,
                in_words_ptr,
                weight_ptr,
                bias_ptr,
                rec_weight_t_ptr,
                rec_bias_ptr,
                rec0_ptr,
                words_ptr,
                row,
                b,
                rows,
                in_words,
                n_words,
                N,
                cols,
                mask,
                like,
                INPUTS,
                STATIC_INPUT,
            )
            at = j * KEPT * rows + b
            store_rows(scratch_ptr, at, rows, N, cols, mask, states + currents, KEPT)
            states = select(execute(states, currents, params, PROGRAM, CONSTANTS), RESULTS)
        tl.debug_barrier()  # scratch may come back to other threads than wrote it

        for back in range(steps):
            j = steps - 1 - back
            row = (start + j) * rows + b
            kept = load_rows(scratch_ptr, j * KEPT * rows + b, rows, N, cols, mask, KEPT, 0.0)
            regs = execute(kept, (), params, PROGRAM, CONSTANTS)
            arrived = ()
            for k in tl.static_range(STATES):
                g = carried[k]
                if k == MEMBRANE:
                    if g_mem_ptr is not None:
                        g += tl.load(g_mem_ptr + row * N + cols, mask=mask, other=0.0)
                arrived = arrived + (g,)
            g_s = zero
            if SPIKING:
                if g_spikes_ptr is not None:
                    g_s = tl.load(g_spikes_ptr + row * N + cols, mask=mask, other=0.0)
                if rec_weight_ptr is not None:
                    tl.debug_barrier()  # nu of the step after was written by other threads
                    if start + j + 1 < T:
                        after = row + rows
                        g_s = add_recurrent_grad(
                            g_s, nu_ptr, rec_weight_ptr, after, INPUTS * N, N, cols, mask, TILE
                        )
            adjoints = execute_back(regs, arrived, g_s, BACKWARD, WINDOW, KIND, P0, P1)
            carried = select(adjoints, FROM_STATES)
            for k in tl.static_range(INPUTS):
                tl.store(nu_ptr + (row * INPUTS + k) * N + cols, adjoints[FROM_INPUTS[k]], mask=mask)
            if d_params_ptr is not None:
                more = ()
                for k in tl.static_range(PARAMS):
                    more = more + (sums[k] + adjoints[FROM_PARAMS[k]],)
                sums = more
        tl.debug_barrier()  # the next chunk's replay overwrites the scratch

    store_rows(d_v0_ptr, b, rows, N, cols, mask, carried, STATES)
    if d_params_ptr is not None:
        store_rows(d_params_ptr, b, rows, N, cols, mask, sums, PARAMS)
