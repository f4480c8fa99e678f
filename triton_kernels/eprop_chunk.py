"""A chunk's part of the gradient of one weight matrix, and its traces per synapse: each is read and written once.

A program holds some inputs by some neurons in registers and walks over samples. It adds what the traces, and the steps
in which one of its inputs is not 0, do to the loss, and moves the traces on. Generated for the components that a rule
keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from textwrap import indent

import torch
import triton
from torch import Tensor

from .sources import module_of

_ROWS, _BLOCK = 8, 64  # of one warp, so that no step waits for another one's barrier
_PROGRAMS = 2048  # as many as fill a large device; more would only make more partial sums

_SOURCE = '''"""E-prop: traces per input {shared}, per synapse {own}. Generated; a change to it is lost."""

import triton
import triton.language as tl

from snn_sparse_plugin.triton_kernels.parts import lowest_bit


@triton.jit(do_not_specialize=["T", "B", "share"])
def sum_and_carry(
    x_ptr,  # (T, B, M): what the weights received
    nu_ptr,  # (targets, T, B, N)
    start_ptr,  # (targets, components, B, N)
    {pointers}own_ptr,  # (traces, B, M, N), moved on in place
    out_ptr,  # (splits, M, N): the gradient
    T,
    B,
    M,
    N,
    share,  # samples of a split
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of M, blocks of N, splits)."""
    inputs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known, mask = inputs < M, cols < N
    inside = known[:, None] & mask[None, :]
    samples = B.to(tl.int64)
    steps = T.to(tl.int64) * samples
    acc = tl.zeros([ROWS, BLOCK], nu_ptr.dtype.element_ty)
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, B)
    for sample in range(first, last):
        b = first.to(tl.int64) + (sample - first)
{before}
        for begin in range(0, T, 32):
            now = begin + tl.arange(0, 32)
            there = (now < T)[:, None] & known[None, :]
            at = (now.to(tl.int64) * samples + b)[:, None] * M + inputs[None, :]
            some = tl.max((tl.load(x_ptr + at, mask=there, other=0.0) != 0).to(tl.int32), axis=1)
            word = tl.sum(some << tl.arange(0, 32), axis=0)
            while word != 0:
                row = (begin + lowest_bit(word)).to(tl.int64) * samples + b
                x = tl.load(x_ptr + row * M + inputs, mask=known, other=0.0)[:, None]
{event}
                word = word ^ (word & -word)
{after}
    at = (tl.program_id(2).to(tl.int64) * M + inputs[:, None]) * N + cols[None, :]
    tl.store(out_ptr + at, acc, mask=inside)
'''


@cache
def source_of(components: int, shared: tuple[int, ...], own: tuple[int, ...], carry: bool) -> str:
    """The kernel ``sum_and_carry``.

    Args:
        components: of the state and the readout's memory.
        shared, own: those with traces per input and per synapse; target ``1 + k`` is that of ``own[k]``.
        carry: whether traces per synapse move on.
    """
    before = [
        f"s{k} = tl.load(s{k}_ptr + b * M + inputs, mask=known, other=0.0)[:, None]"
        for k in range(len(shared))
    ]
    for k in range(len(own)):
        before += [
            f"at{k} = (({k} * samples + b) * M + inputs[:, None]) * N + cols[None, :]",
            f"o{k} = tl.load(own_ptr + at{k}, mask=inside, other=0.0)",
        ]
    traces = [*(f"s{k}" for k in range(len(shared))), *(f"o{k}" for k in range(len(own)))]
    targets = ["acc", *(f"n{k}" for k in range(len(own)) if carry)]
    event = []
    for target, total in enumerate(targets):
        if target:
            before.append(f"{total} = tl.zeros_like(acc)")
        for component, trace in zip((*shared, *own), traces, strict=True):
            at = f"start_ptr + ({target * components + component} * samples + b) * N + cols"
            before.append(f"{total} += tl.load({at}, mask=mask, other=0.0)[None, :] * {trace}")
        at = f"nu_ptr + ({target} * steps + row) * N + cols"
        event.append(f"{total} += x * tl.load({at}, mask=mask, other=0.0)[None, :]")
    after = [f"tl.store(own_ptr + at{k}, n{k}, mask=inside)" for k in range(len(own)) if carry]
    return _SOURCE.format(
        shared=list(shared),
        own=list(own),
        pointers="".join(f"s{k}_ptr,  # (B, M)\n    " for k in range(len(shared))),
        before=indent("\n".join(before), " " * 8),
        event=indent("\n".join(event), " " * 16),
        after=indent("\n".join(after), " " * 8),
    )


def sum_and_carry(
    x: Tensor,
    nu: Tensor,
    start: Tensor,
    shared: Sequence[tuple[int, Tensor]],
    own: Tensor,
    own_at: Sequence[int],
    carry: bool,
) -> Tensor:
    """The gradient (M, N) of a weight matrix that received x (K, B, M); its traces per synapse move on by the chunk.

    Args:
        nu, start: of :func:`..eprop.scan`; target ``1 + k`` is that of ``own[k]``.
        shared: traces per input (B, M), with their components.
        own: traces per synapse, (O, B, M, N), changed in place; ``own_at`` their components.
        carry: False: they stay as they are.
    """
    (K, B, M), N = x.shape, nu.shape[-1]
    places = tuple(place for place, _ in shared)
    kernel = module_of(source_of(start.shape[1], places, tuple(own_at), carry), "eprop_chunk").sum_and_carry
    block = min(_BLOCK, max(16, triton.next_power_of_2(N)))
    tiles = triton.cdiv(M, _ROWS), triton.cdiv(N, block)
    share = triton.cdiv(B, max(1, min(B, _PROGRAMS // (tiles[0] * tiles[1]))))
    splits = triton.cdiv(B, share)
    out = nu.new_empty(splits, M, N)
    with torch.cuda.device_of(nu):
        kernel[(*tiles, splits)](
            x.contiguous(), nu, start, *(trace.contiguous() for _, trace in shared), own, out,
            K, B, M, N, share, ROWS=_ROWS, BLOCK=block, num_warps=1,
        )  # fmt: skip
    return out.sum(0) if splits > 1 else out[0]
