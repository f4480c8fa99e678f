"""Neurons given by equations, on the GPU: the program is a constant, so each compiles to straight code in registers.

Registers and their adjoints are tuples that only grow: the forward appends one value an operation, the backward one
adjoint a register, from the last to the first.
"""

import triton
import triton.language as tl

from .backward import add_recurrent_grad
from .forward import input_current, recurrent_current
from .packed import store_packed
from .surrogates import surrogate_grad


@triton.jit
def load_rows(ptr, row, stride, N, cols, mask, COUNT: tl.constexpr, OTHER: tl.constexpr):
    """``COUNT`` rows of N values, ``stride`` rows apart, as a tuple."""
    found = ()
    for k in tl.static_range(COUNT):
        found = found + (tl.load(ptr + (row + k * stride) * N + cols, mask=mask, other=OTHER),)
    return found


@triton.jit
def store_rows(ptr, row, stride, N, cols, mask, values, COUNT: tl.constexpr):
    for k in tl.static_range(COUNT):
        tl.store(ptr + (row + k * stride) * N + cols, values[k], mask=mask)


@triton.jit
def divide(a, b):
    """Rounded as IEEE says: Triton's own float32 division is faster and less exact."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def operate(KIND: tl.constexpr, a, b):
    """One operation of ``snn_sparse_plugin.equations``."""
    if KIND == "add":
        return a + b
    elif KIND == "sub":
        return a - b
    elif KIND == "mul":
        return a * b
    elif KIND == "div":
        return divide(a, b)
    elif KIND == "neg":
        return -a
    elif KIND == "exp":
        return tl.exp(a)
    elif KIND == "log":
        return tl.log(a)
    elif KIND == "relu":
        return tl.where(a <= 0, tl.zeros_like(a), a)
    elif KIND == "abs":
        return tl.abs(a)
    elif KIND == "spike" or KIND == "above":
        return (a > 0).to(a.dtype)
    else:
        return a


@triton.jit
def execute(states, x, rec, params, PROGRAM: tl.constexpr, CONSTANTS: tl.constexpr):
    """All registers of one step."""
    regs = states + (x, rec) + params
    for k in tl.static_range(len(CONSTANTS)):
        regs = regs + (tl.full(x.shape, CONSTANTS[k], x.dtype),)
    for p in tl.static_range(len(PROGRAM)):
        regs = regs + (operate(PROGRAM[p][0], regs[PROGRAM[p][1]], regs[PROGRAM[p][2]]),)
    return regs


@triton.jit
def select(regs, WHICH: tl.constexpr):
    """Some of the registers, as a tuple."""
    found = ()
    for k in tl.static_range(len(WHICH)):
        found = found + (regs[WHICH[k]],)
    return found


@triton.jit
def passed_back(
    KIND: tl.constexpr,
    SECOND: tl.constexpr,
    up,
    a,
    b,
    out,
    WINDOW: tl.constexpr,
    SURROGATE: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
):
    """What an operation sends to its first or second operand for the adjoint ``up`` of its result."""
    zero = tl.zeros_like(up)
    if KIND == "add":
        return up
    elif KIND == "sub":
        if SECOND:
            return -up
        else:
            return up
    elif KIND == "mul":
        if SECOND:
            return up * a
        else:
            return up * b
    elif KIND == "div":
        if SECOND:
            return -divide(up * out, b)
        else:
            return divide(up, b)
    elif KIND == "neg":
        return -up
    elif KIND == "exp":
        return up * out
    elif KIND == "log":
        return divide(up, a)
    elif KIND == "relu":
        return tl.where(a > 0, up, zero)
    elif KIND == "abs":
        return tl.where(a > 0, up, tl.where(a < 0, -up, zero))
    elif KIND == "copy":
        return up
    else:
        tl.static_assert(KIND == "spike", "no gradient passes this operation")
        phi = surrogate_grad(a, SURROGATE, P0, P1)
        if WINDOW is not None:
            phi = tl.where(tl.abs(a) < WINDOW, phi, zero)
        return up * phi


@triton.jit
def execute_back(
    regs,
    carried,
    g_s,
    BACKWARD: tl.constexpr,
    WINDOW: tl.constexpr,
    SURROGATE: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
):
    """The adjoints of all registers, last register first.

    ``BACKWARD`` holds for each: which states end in it, whether it is the output, and its uses as (kind, second
    operand, place of the result's adjoint, a, b, result).
    """
    adjoints = ()
    for n in tl.static_range(len(BACKWARD)):
        g = tl.zeros_like(g_s)
        for k in tl.static_range(len(BACKWARD[n][0])):
            g += carried[BACKWARD[n][0][k]]
        if BACKWARD[n][1]:
            g += g_s
        for u in tl.static_range(len(BACKWARD[n][2])):
            g += passed_back(
                BACKWARD[n][2][u][0],
                BACKWARD[n][2][u][1],
                adjoints[BACKWARD[n][2][u][2]],
                regs[BACKWARD[n][2][u][3]],
                regs[BACKWARD[n][2][u][4]],
                regs[BACKWARD[n][2][u][5]],
                WINDOW,
                SURROGATE,
                P0,
                P1,
            )
        adjoints = adjoints + (g,)
    return adjoints


@triton.jit(do_not_specialize=["T", "B"])
def program_forward(
    x_ptr,  # inputs and outputs as in spiking_layer_forward
    in_words_ptr,
    weight_ptr,
    bias_ptr,
    rec_weight_ptr,
    rec_bias_ptr,
    rec0_ptr,
    state_ptr,  # (K, B, N)
    params_ptr,  # (P, N)
    words_ptr,
    spikes_ptr,
    mem_ptr,
    final_ptr,  # out (K, B, N)
    checkpoint_ptr,  # out (chunks, K, B, N) or None
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
    states = load_rows(state_ptr, b, rows, N, cols, mask, STATES, 0.0)
    params = load_rows(params_ptr, 0, 1, N, cols, mask, PARAMS, 1.0)
    near = tl.zeros([BLOCK_N], dtype=tl.int64)
    like = states[0]
    rec = tl.zeros_like(like)
    row = b
    for start in range(0, T, CHUNK):
        if checkpoint_ptr is not None:
            at = (start // CHUNK) * STATES * rows + b
            store_rows(checkpoint_ptr, at, rows, N, cols, mask, states, STATES)
        for t in range(start, tl.minimum(start + CHUNK, T)):
            x = input_current(
                x_ptr, in_words_ptr, weight_ptr, bias_ptr, row, b, in_words, N, cols, mask, like, STATIC_INPUT
            )
            if rec_weight_ptr is not None:
                tl.debug_barrier()  # the words of the step before were written by other threads
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
                    N,
                    cols,
                    mask,
                    like,
                )
            regs = execute(states, x, rec, params, PROGRAM, CONSTANTS)
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
    store_rows(final_ptr, b, rows, N, cols, mask, states, STATES)
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
    checkpoint_ptr,  # (chunks, K, B, N)
    params_ptr,
    g_spikes_ptr,
    g_mem_ptr,
    g_state_ptr,  # (K, B, N) or None
    kept_ptr,  # scratch (CHUNK, K + 2, B, N): states before each step, its x and rec
    nu_ptr,  # out (T, B, N)
    d_state_ptr,  # out (K, B, N)
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
    FROM_STATES: tl.constexpr,  # places of the adjoints of the states, of x and of the parameters
    FROM_X: tl.constexpr,
    FROM_PARAMS: tl.constexpr,
    STATES: tl.constexpr,
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
    like = tl.load(checkpoint_ptr + b * N + cols, mask=mask, other=0.0)
    zero = tl.zeros_like(like)
    carried = ()
    for k in tl.static_range(STATES):
        carried = carried + (zero,)
    if g_state_ptr is not None:
        carried = load_rows(g_state_ptr, b, rows, N, cols, mask, STATES, 0.0)
    sums = ()
    for k in tl.static_range(PARAMS):
        sums = sums + (zero,)
    rec = zero

    chunks = (T + CHUNK - 1) // CHUNK
    for c in range(chunks):
        chunk = chunks - 1 - c
        start = chunk * CHUNK
        steps = tl.minimum(T - start, CHUNK)
        states = load_rows(checkpoint_ptr, chunk * STATES * rows + b, rows, N, cols, mask, STATES, 0.0)
        for j in range(steps):
            row = (start + j) * rows + b
            x = input_current(
                x_ptr, in_words_ptr, weight_ptr, bias_ptr, row, b, in_words, N, cols, mask, like, STATIC_INPUT
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
                    like,
                )
            at = j * (STATES + 2) * rows + b
            store_rows(kept_ptr, at, rows, N, cols, mask, states + (x, rec), STATES + 2)
            states = select(execute(states, x, rec, params, PROGRAM, CONSTANTS), RESULTS)
        tl.debug_barrier()  # scratch may come back to other threads than wrote it

        for back in range(steps):
            j = steps - 1 - back
            row = (start + j) * rows + b
            kept = load_rows(kept_ptr, j * (STATES + 2) * rows + b, rows, N, cols, mask, STATES + 2, 0.0)
            before = ()
            for k in tl.static_range(STATES):
                before = before + (kept[k],)
            regs = execute(before, kept[STATES], kept[STATES + 1], params, PROGRAM, CONSTANTS)
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
                        g_s = add_recurrent_grad(g_s, nu_ptr, rec_weight_ptr, row + rows, N, cols, mask, TILE)
            adjoints = execute_back(regs, arrived, g_s, BACKWARD, WINDOW, KIND, P0, P1)
            carried = select(adjoints, FROM_STATES)
            tl.store(nu_ptr + row * N + cols, adjoints[FROM_X], mask=mask)
            if d_params_ptr is not None:
                more = ()
                for k in tl.static_range(PARAMS):
                    more = more + (sums[k] + adjoints[FROM_PARAMS[k]],)
                sums = more
        tl.debug_barrier()  # the next chunk's replay overwrites the scratch

    store_rows(d_state_ptr, b, rows, N, cols, mask, carried, STATES)
    if d_params_ptr is not None:
        store_rows(d_params_ptr, b, rows, N, cols, mask, sums, PARAMS)
