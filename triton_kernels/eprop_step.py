"""One step of a neuron given by its equations, with the local derivatives that e-prop needs, in one launch.

What is computed after the equations is said by ``snn_sparse_plugin/jacobian.py``; both are constants of the kernel.
"""

import torch
import triton
import triton.language as tl

from .program import execute, load_rows, operate, select, store_rows
from .surrogates import surrogate_grad


@triton.jit(do_not_specialize=["t", "steps", "B"])
def eprop_step(
    x_ptr,  # (B, N)
    rec_ptr,  # (B, N) or None
    before_ptr,  # (K, B, N)
    params_ptr,  # (P, N)
    after_ptr,  # out (1 + K, B, N)
    local_ptr,  # (V, steps, B, N): row t is written
    t,
    steps,
    B,
    N,
    PROGRAM: tl.constexpr,
    CONSTANTS: tl.constexpr,
    MORE_CONSTANTS: tl.constexpr,
    SITES: tl.constexpr,  # arguments of spikes
    MORE: tl.constexpr,  # operations of the derivatives
    RESULTS: tl.constexpr,
    KEPT: tl.constexpr,
    STATES: tl.constexpr,
    PARAMS: tl.constexpr,
    KIND: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (B, blocks of N)."""
    b = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    rows = B.to(tl.int64)
    states = load_rows(before_ptr, b, rows, N, cols, mask, STATES, 0.0)
    params = load_rows(params_ptr, 0, 1, N, cols, mask, PARAMS, 1.0)
    x = tl.load(x_ptr + b * N + cols, mask=mask, other=0.0)
    rec = tl.zeros_like(x)
    if rec_ptr is not None:
        rec = tl.load(rec_ptr + b * N + cols, mask=mask, other=0.0)
    regs = execute(states, (x, rec), params, PROGRAM, CONSTANTS)
    for k in tl.static_range(len(MORE_CONSTANTS)):
        regs = regs + (tl.full(x.shape, MORE_CONSTANTS[k], x.dtype),)
    for k in tl.static_range(len(SITES)):
        regs = regs + (surrogate_grad(regs[SITES[k]], KIND, P0, P1),)
    for p in tl.static_range(len(MORE)):
        regs = regs + (operate(MORE[p][0], regs[MORE[p][1]], regs[MORE[p][2]]),)
    store_rows(after_ptr, b, rows, N, cols, mask, select(regs, RESULTS), len(RESULTS))
    at = t.to(tl.int64) * rows + b
    store_rows(local_ptr, at, steps * rows, N, cols, mask, select(regs, KEPT), len(KEPT))


def constants(program, derivatives, results, kept, surrogate):
    """What the kernel is compiled for."""
    p0, p1 = surrogate.packed
    return {
        "PROGRAM": tuple((op.kind, op.a, op.b) for op in program.ops),
        "CONSTANTS": program.constants,
        "MORE_CONSTANTS": derivatives.constants,
        "SITES": tuple(argument for argument, _ in derivatives.sites),
        "MORE": tuple((op.kind, op.a, op.b) for op in derivatives.ops),
        "RESULTS": tuple(results),
        "KEPT": tuple(kept),
        "STATES": len(program.states),
        "PARAMS": len(program.params),
        "KIND": surrogate.kind,
        "P0": p0,
        "P1": p1,
    }


def runner(program, derivatives, results, kept, params, surrogate):
    """A function ``(x, rec, before, after, local, t)`` that runs one step of a neuron; see ``eprop_step``.

    Args:
        results: registers of the rows of ``after``: the output and the next states.
        kept: registers of the rows of ``local``.
        params: (P, N).
    """
    fixed = constants(program, derivatives, results, kept, surrogate)
    N = params.shape[1]
    block = min(256, max(32, triton.next_power_of_2(N)))
    params = params.contiguous()

    def run(x, rec, before, after, local, t):
        B = x.shape[0]
        eprop_step[(B, triton.cdiv(N, block))](
            x.contiguous(),
            None if rec is None else rec.contiguous(),
            before,
            params,
            after,
            local if len(kept) else torch.empty_like(after[:0]),
            t,
            local.shape[1],
            B,
            N,
            **fixed,
            BLOCK_N=block,
            num_warps=max(1, block // 64),
            enable_fp_fusion=False,  # one rounding where upstream has two would move spikes
        )

    return run
