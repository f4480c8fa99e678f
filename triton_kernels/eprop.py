"""E-prop's scan back over a chunk of steps, for any neuron: one launch walks all steps with the adjoints in registers.

``rule.py`` of the learner holds the equations. A step is a small matrix per neuron and sample, with the derivatives of
every component of the state after it (and, in the last row, of the spikes) by every component before it (and, in the
last column, by the current). Adjoints of several targets at once are multiplied by it.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["K", "size"])
def eprop_scan(
    steps_ptr,  # (K, n + 1, n + 1, size)
    filtered_ptr,  # (K, size): learning signal of the output component
    direct_ptr,  # (K, size): learning signal of the spikes
    first_ptr,  # (targets, n): adjoints after the last step
    nu_ptr,  # out (targets, K, size): what the currents do to the targets
    start_ptr,  # out (targets, n, size): what the state before the first step does to them
    K,
    size,
    N_STATES: tl.constexpr,
    TARGETS: tl.constexpr,
    OUT: tl.constexpr,  # the output component, -1: none
    ROWS: tl.constexpr,  # powers of two that hold n + 1 and the targets
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of size)."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < size
    lane = tl.arange(0, LANES)
    row = tl.arange(0, ROWS)
    span = size.to(tl.int64)
    wide = N_STATES + 1

    known = (lane < TARGETS)[:, None] & (row < N_STATES)[None, :]
    first = tl.load(first_ptr + lane[:, None] * N_STATES + row[None, :], mask=known, other=0.0)
    adjoint = tl.broadcast_to(first[:, :, None], (LANES, ROWS, BLOCK))
    loss = (lane == 0)[:, None, None]
    is_out = (row == OUT)[None, :, None]
    is_spike = (row == N_STATES)[None, :, None]
    square = (row < wide)[:, None, None] & (row < wide)[None, :, None] & inside[None, None, :]
    places = row[:, None, None] * wide + row[None, :, None]
    for back in range(K):
        t = (K - 1 - back).to(tl.int64)
        filtered = tl.load(filtered_ptr + t * span + cols, mask=inside, other=0.0)
        direct = tl.load(direct_ptr + t * span + cols, mask=inside, other=0.0)
        adjoint += tl.where(loss & is_out, filtered[None, None, :], 0.0)
        adjoint = tl.where(is_spike, tl.where(loss, direct[None, None, :], 0.0), adjoint)
        step = tl.load(
            steps_ptr + (t * wide * wide + places) * span + cols[None, None, :], mask=square, other=0.0
        )
        back_one = tl.sum(adjoint[:, :, None, :] * step[None, :, :, :], axis=1)
        nu = tl.sum(tl.where(is_spike, back_one, 0.0), axis=1)
        tl.store(
            nu_ptr + (lane[:, None] * K + t) * span + cols[None, :],
            nu,
            mask=(lane < TARGETS)[:, None] & inside[None, :],
        )
        adjoint = tl.where(is_spike, 0.0, back_one)
    tl.store(
        start_ptr + (lane[:, None, None] * N_STATES + row[None, :, None]) * span + cols[None, None, :],
        adjoint,
        mask=known[:, :, None] & inside[None, None, :],
    )


def scan(steps, filtered, direct, first, out):
    """nu (targets, K, B, N) and start (targets, n, B, N); see ``learners/eprop/rule.py``.

    Args:
        steps: (K, n + 1, n + 1, B, N); the last row belongs to the spikes, the last column to the current.
        filtered, direct: (K, B, N).
        first: (targets, n), the adjoints after the last step; target 0 is the loss.
        out: the component that ``filtered`` acts on, -1 where it is part of ``direct``.
    """
    K, wide = steps.shape[:2]
    shape, targets, n = steps.shape[3:], len(first), wide - 1
    size = shape.numel()
    nu = torch.empty(targets, K, *shape, dtype=steps.dtype, device=steps.device)
    start = torch.empty(targets, n, *shape, dtype=steps.dtype, device=steps.device)
    rows, lanes = triton.next_power_of_2(wide), triton.next_power_of_2(targets)
    block = max(16, 1024 // (rows * max(rows, lanes)))
    eprop_scan[(triton.cdiv(size, block),)](
        steps.contiguous(),
        filtered.contiguous(),
        direct.contiguous(),
        first.contiguous(),
        nu,
        start,
        K,
        size,
        N_STATES=n,
        TARGETS=targets,
        OUT=out,
        ROWS=rows,
        LANES=lanes,
        BLOCK=block,
        num_warps=4,
    )
    return nu, start
