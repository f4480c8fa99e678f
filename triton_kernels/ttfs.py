"""Time-to-first-spike encode-decode at the speed of memory: one pass forward, one pass backward.

An element of 4 bytes moves 9 forward (x in, its value and its step out) and 13 backward (gradient, x and step in,
gradient out). Autograd keeps x, which is the tensor of the layer before and no copy, and the step, one byte. Half
precisions are read and written as they are and computed in float32.

Four launches a layer: the table, forward, backward, and the sums of the two parameters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.backend import TtfsBackward

BLOCK, WARPS = 2048, 8  # eight elements a thread: two loads of 16 bytes of each float32 tensor
SILENT = tl.constexpr(255)


@triton.jit(do_not_specialize=["window"])
def ttfs_table(
    tau_ptr,
    t_d_ptr,
    out_ptr,  # (2, window)
    window,
    AHEAD: tl.constexpr,
    RATE: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Thresholds, ``AHEAD`` steps ahead, and values, in float64 and rounded once. Grid (1,)."""
    k = tl.arange(0, BLOCK)
    tau, t_d = tl.load(tau_ptr).to(tl.float64), tl.load(t_d_ptr).to(tl.float64)
    left = t_d - k.to(tl.float64)
    for row in tl.static_range(2):
        u = (left - tl.full([BLOCK], AHEAD if row == 0 else 0.0, tl.float64)) / tau
        value = u + 1.0 if RATE == 0 else tl.exp(u * tl.full([BLOCK], RATE, tl.float64))
        value = tl.maximum(value, tl.full([BLOCK], LEAST, tl.float64))
        value = tl.minimum(value, tl.full([BLOCK], MOST, tl.float64))
        tl.store(out_ptr + row * window + k, value.to(out_ptr.dtype.element_ty), mask=k < window)


@triton.jit(do_not_specialize=["window"])
def ttfs_forward(x_ptr, table_ptr, out_ptr, times_ptr, n, window, SEARCH: tl.constexpr, BLOCK: tl.constexpr):
    """``table`` holds the thresholds of the window's steps, then their values; 2^``SEARCH`` is more than the window."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    given = tl.load(x_ptr + at, mask=mask, other=0.0)
    x = given.to(table_ptr.dtype.element_ty)
    # thresholds fall, so the first step reached is the number of those that are not; NaN reaches none
    t = tl.zeros([BLOCK], tl.int32)
    for k in tl.static_range(SEARCH):
        more = t + (1 << (SEARCH - 1 - k))
        inside = more <= window
        threshold = tl.load(table_ptr + more - 1, mask=inside, other=0.0)
        t = tl.where(inside & ((x < threshold) | (x != x)), more, t)
    fires = t < window
    value = tl.load(table_ptr + window + t, mask=mask & fires, other=0.0)
    tl.store(out_ptr + at, tl.where(given == given, value.to(given.dtype), given), mask=mask)
    tl.store(times_ptr + at, tl.where(fires, t, SILENT).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["window"])
def ttfs_backward(
    grad_ptr,
    x_ptr,
    times_ptr,
    table_ptr,
    tau_ptr,
    t_d_ptr,
    out_ptr,
    sums_ptr,  # (2, programs)
    n,
    window,
    RATE: tl.constexpr,
    PARAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``sums``: of how late spikes were, over quantised elements, and of the gradient that arrives at clipped ones."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    dtype = table_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(dtype)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(dtype)
    t = tl.load(times_ptr + at, mask=mask, other=SILENT).to(tl.int32)
    largest = tl.load(table_ptr + window)
    fires = t != SILENT
    inside = fires & (x <= largest)
    value = tl.load(table_ptr + window + t, mask=mask & fires, other=0.0)
    safe = tl.where(inside, x, largest)
    ratio = tl.where(inside, 1.0, 0.0) if RATE == 0 else tl.where(inside, value / safe, 0.0)
    found = grad * tl.where(x == x, ratio.to(dtype), x)
    tl.store(out_ptr + at, found.to(out_ptr.dtype.element_ty), mask=mask)
    if PARAMS:
        tau, t_d = tl.load(tau_ptr).to(dtype), tl.load(t_d_ptr).to(dtype)
        if RATE == 0:
            slope = tl.full([BLOCK], 1.0, dtype)
            exact = t_d - tau * (safe - 1.0)
        else:
            slope = value * RATE
            exact = t_d - tau * tl.log(safe) / RATE
        late = tl.where(inside, grad * slope * (t.to(dtype) - exact), 0.0)
        clipped = tl.where(fires & (x > largest), grad, 0.0)
        program, programs = tl.program_id(0), tl.num_programs(0)
        tl.store(sums_ptr + program, tl.sum(late))
        tl.store(sums_ptr + programs + program, tl.sum(clipped))


@triton.jit(do_not_specialize=["programs", "window"])
def ttfs_parameters(
    sums_ptr,  # (2, programs)
    table_ptr,
    tau_ptr,
    t_d_ptr,
    d_tau_ptr,
    d_t_d_ptr,
    programs,
    window,
    RATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of tau and t_d from the sums of all programs. Grid (1,)."""
    late, clipped = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(0, programs, BLOCK):
        at = first + tl.arange(0, BLOCK)
        late += tl.load(sums_ptr + at, mask=at < programs, other=0.0).to(tl.float64)
        clipped += tl.load(sums_ptr + programs + at, mask=at < programs, other=0.0).to(tl.float64)
    tau, t_d = tl.load(tau_ptr).to(tl.float64), tl.load(t_d_ptr).to(tl.float64)
    at_clip = tl.sum(clipped)
    if RATE != 0:
        at_clip *= tl.load(table_ptr + window).to(tl.float64) * RATE
    d_tau = (tl.sum(late) - at_clip * t_d) / (tau * tau)
    tl.store(d_tau_ptr, d_tau.to(d_tau_ptr.dtype.element_ty))
    tl.store(d_t_d_ptr, (at_clip / tau).to(d_t_d_ptr.dtype.element_ty))


def table(tau: Tensor, t_d: Tensor, window: int, ahead: float, rate: float, dtype: torch.dtype) -> Tensor:
    """Thresholds and values of every step, (2, window), of the kernel that ``rate`` names."""
    info = torch.finfo(dtype)
    out = torch.empty(2, window, dtype=dtype, device=tau.device)
    with torch.cuda.device_of(tau):
        ttfs_table[(1,)](
            tau, t_d, out, window,
            AHEAD=ahead, RATE=rate, LEAST=info.tiny, MOST=info.max, BLOCK=256, num_warps=4,
        )  # fmt: skip
    return out


def forward(x: Tensor, table: Tensor, out: Tensor, times: Tensor) -> None:
    """Write xhat and the spike times; all dense, with the same strides."""
    n, window = x.numel(), table.shape[1]
    if n:
        with torch.cuda.device_of(x):
            ttfs_forward[(triton.cdiv(n, BLOCK),)](
                x, table, out, times, n, window, SEARCH=window.bit_length(), BLOCK=BLOCK, num_warps=WARPS
            )


def backward(call: TtfsBackward) -> tuple[Tensor, Tensor]:
    """Write the gradient of x and return those of tau and t_d; without ``params`` nothing is in them."""
    x, table, n, window = call.x, call.table, call.x.numel(), call.table.shape[1]
    programs = triton.cdiv(n, BLOCK)
    sums = table.new_empty(2, programs if call.params else 0)
    d_tau, d_t_d = torch.empty_like(call.tau), torch.empty_like(call.t_d)
    with torch.cuda.device_of(x):
        if n:
            ttfs_backward[(programs,)](
                call.grad, x, call.times, table, call.tau, call.t_d, call.out, sums, n, window,
                RATE=call.rate, PARAMS=call.params, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
        if call.params:
            ttfs_parameters[(1,)](
                sums, table, call.tau, call.t_d, d_tau, d_t_d, programs, window,
                RATE=call.rate, BLOCK=1024, num_warps=8,
            )  # fmt: skip
    return d_tau, d_t_d
