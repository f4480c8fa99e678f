"""Products with spikes, outside the time loop and parallel over all rows: one row of a table is added for every event.

With the spikes of a layer's input as words (R, ceil(M / 32)) and W^T as the table the sum is the input current; with
the transposed words (M, ceil(R / 32)) and nu as the table it is the gradient of the weight. Both are deterministic.
Kernels run on the current device: a backend makes the tensors' own the current one, once for a layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.precision import state_dtype
from .parts import gather_rows

_SPLITS = (
    16  # parts that the long sums of a weight's gradient are made of, so that every multiprocessor has some
)


@triton.jit
def sum_rows(
    words_ptr,  # (R, n_words)
    values_ptr,  # value of bit k of row r at r * row_step + k * bit_step; None: all are 1
    table_ptr,  # (32 * n_words at most, N)
    bias_ptr,  # (N,) or None
    out_ptr,  # (splits, R, N)
    row_step,
    bit_step,
    n_words,
    N,
    share,  # words of a split
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,  # the table holds pairs of bf16 numbers
):
    """Grid (R, blocks of N, splits)."""
    r = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    split = tl.program_id(2)
    # sums are not made in half precision
    if out_ptr.dtype.element_ty.primitive_bitwidth == 64:
        acc = tl.zeros([BLOCK], dtype=tl.float64)
    else:
        acc = tl.zeros([BLOCK], dtype=tl.float32)
    if bias_ptr is not None:
        acc = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(acc.dtype)
    first = split * share
    last = tl.minimum(first + share, n_words)
    words_ptr += r * n_words
    if values_ptr is not None:
        values_ptr += r * row_step
    acc = gather_rows(acc, words_ptr, first, last, values_ptr, bit_step, table_ptr, N, cols, mask, PAIRS)
    tl.store(out_ptr + (split.to(tl.int64) * tl.num_programs(0) + r) * N + cols, acc, mask=mask)


@triton.jit(do_not_specialize=["R"])
def pack_rows(x_ptr, words_ptr, R, M, n_words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Which numbers of x (R, M) are not 0, as words (R, n_words). Grid (blocks of R, blocks of words)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * (32 * WORDS) + tl.arange(0, 32 * WORDS)
    inside = (rows < R)[:, None] & (cols < M)[None, :]
    x = tl.load(x_ptr + rows[:, None] * M + cols[None, :], mask=inside, other=0.0)
    bits = tl.reshape((x != 0).to(tl.int32), (ROWS, WORDS, 32)) << tl.arange(0, 32)[None, None, :]
    words = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = (rows < R)[:, None] & (words < n_words)[None, :]
    tl.store(words_ptr + rows[:, None] * n_words + words[None, :], tl.sum(bits, axis=2), mask=inside)


@triton.jit(do_not_specialize=["R"])
def transpose_words(words_ptr, out_ptr, R, M, n_words, row_words, ROWS: tl.constexpr):
    """Words (R, n_words) over M columns as words (M, row_words) over R. Grid (blocks of R, n_words)."""
    k = tl.program_id(1)
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    word = tl.load(words_ptr + rows.to(tl.int64) * n_words + k, mask=rows < R, other=0)
    bits = (word[:, None] >> tl.arange(0, 32)[None, :]) & 1
    bits = tl.reshape(bits, (ROWS // 32, 32, 32)) << tl.arange(0, 32)[None, :, None]
    columns = k * 32 + tl.arange(0, 32)
    words = first // 32 + tl.arange(0, ROWS // 32)
    inside = (words < row_words)[:, None] & (columns < M)[None, :]
    out = out_ptr + columns.to(tl.int64)[None, :] * row_words + words[:, None]
    tl.store(out, tl.sum(bits, axis=1), mask=inside)


def packed(x: Tensor) -> Tensor:
    """Which numbers of ``x`` (T, B, M) are not 0, as bits: words (T, B, ceil(M / 32)) int32."""
    T, B, M = x.shape
    words = torch.empty(T, B, -(-M // 32), dtype=torch.int32, device=x.device)
    if words.numel():
        grid = (-(-T * B // 16), -(-words.shape[2] // 8))
        pack_rows[grid](x.contiguous(), words, T * B, M, words.shape[2], ROWS=16, WORDS=8, num_warps=4)
    return words


def current(words: Tensor, values: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of spikes: words (T, B, ceil(M / 32)), ``values`` (T, B, M) where they are graded -> (T, B, N)."""
    T, B, n_words = words.shape
    N, M = weight.shape
    out = weight.new_empty(T, B, N)
    if out.numel():
        values = None if values is None else values.contiguous()
        # turned at each call: what is kept would be stale once the replay of a CUDA graph has changed the weight, of
        # which its version tells nothing
        _launch(words, values, weight.t().contiguous(), bias, out, T * B, M, 1, n_words, 1)
    return out


def add_rows(words: Tensor, table: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out`` (T, B, N) = the bias, and a row of the table (M, N) for every spike of words (T, B, ceil(M / 32))."""
    T, B, N = out.shape
    if out.numel():
        _launch(words, None, table, bias, out, T * B, N, 1, words.shape[2], 1)


def weight_gradient(nu: Tensor, words: Tensor, values: Tensor | None, M: int, pairs: bool = False) -> Tensor:
    """Sum over steps and samples of nu (T, B, N), which may be pairs of bf16 numbers, times the spikes: (N, M)."""
    T, B, N = nu.shape
    R = T * B
    if R * N * M == 0:
        return nu.new_zeros(N, M)
    row_words = -(-R // 32)
    turned = torch.empty(M, row_words, dtype=torch.int32, device=nu.device)
    grid = (-(-R // 1024), words.shape[2])
    transpose_words[grid](words, turned, R, M, words.shape[2], row_words, ROWS=1024, num_warps=4)
    splits = min(_SPLITS, row_words)
    out = nu.new_empty(splits, M, N, dtype=state_dtype(nu.dtype))
    values = None if values is None else values.contiguous()
    _launch(turned, values, nu.contiguous(), None, out, M, 1, M, row_words, splits, pairs)
    # in the layout of the weight, in which it can become its gradient without a copy
    grad = nu.new_empty(N, M)
    torch.sum(out, 0, dtype=grad.dtype, out=grad.t())
    return grad


def _launch(
    words: Tensor,
    values: Tensor | None,
    table: Tensor,
    bias: Tensor | None,
    out: Tensor,
    rows: int,
    row_step: int,
    bit_step: int,
    n_words: int,
    splits: int,
    pairs: bool = False,
) -> None:
    N = out.shape[-1]
    block = min(256, max(32, 1 << (N - 1).bit_length()))
    sum_rows[(rows, -(-N // block), splits)](
        *(words, values, table, bias, out, row_step, bit_step, n_words, N, -(-n_words // splits)),
        BLOCK=block,
        PAIRS=pairs,
        num_warps=1,
    )
