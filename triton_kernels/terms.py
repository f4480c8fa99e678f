"""Products in nearly float32 accuracy by the library's bf16 products, which are many times as fast as its float32 ones.

A spike is exact in bf16, and a weight is the sum of three bf16 numbers, so only the sums of a current are rounded. The
input's gradient multiplies nu as pairs, which the scan writes, with the weight as pairs: each is off by 2^-17 of it at
most. bf16 has the range of float32; an infinite or NaN number has no terms, and the gradient is made in float32 then.

A pair takes the place of its float32, which is where a thread of the scan may write. Rows that hold all larger terms
and then all smaller ones would save a quarter of the product, and take memory of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .parts import bf16_bits, remainder, unpaired

# numbers that are made on the way at once: little memory is needed, and much stays in the cache
_BLOCK_NUMBERS = 1 << 23

# products that one call of the library adds up: an H100's tensor cores round long sums worse than float32 does. Of
# pairs 600 were off by 4.6e-6 of the norm and 3000 by 6.7e-6, of spikes with three terms 3000 by 8e-7
_LONGEST_OF_PAIRS, _LONGEST_OF_SPIKES = 1024, 3072


@triton.jit(do_not_specialize=["first", "R"])
def unpack_three(words_ptr, out_ptr, first, R, n_words, ROWS: tl.constexpr):
    """Rows of words from ``first`` on as bf16 0 and 1, three times side by side: out (R, 3 * 32 * n_words) int16."""
    k = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < R
    word = tl.load(words_ptr + (first + rows).to(tl.int64) * n_words + k, mask=inside, other=0)
    ones = ((word[:, None] >> tl.arange(0, 32)[None, :]) & 1) * 0x3F80
    width = 32 * n_words
    out = out_ptr + rows.to(tl.int64)[:, None] * 3 * width + k * 32 + tl.arange(0, 32)[None, :]
    for copy in range(3):
        tl.store(out + copy * width, ones.to(tl.int16), mask=inside[:, None])


@triton.jit
def weight_terms(
    weight_ptr, out_ptr, N, M, stride_n, stride_m, width, cols, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Weight (N, M) as out (3 * width, cols) int16: the bf16 terms of W^T below each other, with zeros around."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    n = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    x = tl.load(weight_ptr + n * stride_n + m * stride_m, mask=(n < N) & (m < M), other=0.0)
    inside = (m < width) & (n < cols)
    for term in range(3):
        bits = bf16_bits(x)
        tl.store(out_ptr + (term * width + m) * cols + n, (bits >> 16).to(tl.int16), mask=inside)
        x = remainder(x, bits)


@triton.jit
def weight_pairs(
    weight_ptr, out_ptr, odd_ptr, N, M, stride_n, stride_m, width, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Weight (N, M) as out (2 N, 2 * width) int16: row n twice, as both numbers of a pair of nu multiply it, its larger
    bf16 term and beside it the smaller one. odd: 1 where a number is not finite."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    m = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    x = tl.load(weight_ptr + n * stride_n + m * stride_m, mask=(n < N) & (m < M), other=0.0)
    odd = (n < N) & ~(tl.abs(x) < float("inf"))
    tl.store(odd_ptr + (n - n) + (m - m), tl.full(odd.shape, 1, tl.int32), mask=odd)
    inside = (n < N) & (m < width)
    for term in range(2):
        bits = bf16_bits(x)
        for twice in range(2):
            place = out_ptr + (2 * n + twice) * 2 * width + term * width + m
            tl.store(place, (bits >> 16).to(tl.int16), mask=inside)
        x = remainder(x, bits)


@triton.jit(do_not_specialize=["R", "tiles"])
def again_where_odd(
    odd_ptr, nu_ptr, weight_ptr, out_ptr, R, N, M, stride_n, stride_m, tiles, BLOCK: tl.constexpr
):
    """out (R, M) once more in float32 from the pairs (R, N), where a number is not finite; else nothing."""
    wanted = tl.load(odd_ptr) != 0
    across = tl.cdiv(M, BLOCK)
    for tile in range(tl.program_id(0), tl.where(wanted, tiles, 0), tl.num_programs(0)):
        rows = (tile // across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        cols = tile % across * BLOCK + tl.arange(0, BLOCK)
        acc = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
        for n in range(0, N):
            nu = unpaired(tl.load(nu_ptr + rows * N + n, mask=rows < R, other=0.0))
            row = tl.load(weight_ptr + n * stride_n + cols * stride_m, mask=cols < M, other=0.0)
            acc += nu[:, None] * row[None, :]
        inside = (rows < R)[:, None] & (cols < M)[None, :]
        tl.store(out_ptr + rows[:, None] * M + cols[None, :], acc, mask=inside)


def current(words: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of spikes as words (T, B, ceil(M / 32)) -> (T, B, N) float32."""
    T, B, n_words = words.shape
    N, M = weight.shape
    R, width, cols = T * B, 32 * n_words, _aligned(N)
    out = weight.new_empty(T, B, N)
    flat, added = out.view(R, N), 0.0 if bias is None else bias
    terms = weight.new_empty(3 * width, cols, dtype=torch.int16)
    grid = (-(-width // 32), -(-cols // 32))
    strides = weight.stride()
    weight_terms[grid](weight, terms, N, M, *strides, width, cols, ROWS=32, COLS=32, num_warps=4)
    for first, size in _blocks(R, 3 * width):
        spikes = terms.new_empty(size, 3 * width)
        grid = (-(-size // 32), n_words)
        unpack_three[grid](words, spikes, first, size, n_words, ROWS=32, num_warps=4)
        rows = flat[first : first + size]
        for k in range(0, 3 * width, _LONGEST_OF_SPIKES):
            part = _product(spikes, terms, k, _LONGEST_OF_SPIKES)[:, :N]
            torch.add(part, rows if k else added, out=rows)
    return out


def input_gradient(nu: Tensor, odd: Tensor, weight: Tensor) -> Tensor:
    """``nu @ weight`` for nu (T, B, N) as pairs, weight (N, M) -> (T, B, M) float32. ``odd`` as in the scan."""
    T, B, N = nu.shape
    M = weight.shape[1]
    R, width = T * B, _aligned(M)
    out = weight.new_empty(T, B, M)
    flat, strides = out.view(R, M), weight.stride()
    terms = weight.new_empty(2 * N, 2 * width, dtype=torch.int16)
    numbers = nu.view(R, N).view(torch.int16)
    grid = (-(-N // 32), -(-width // 32))
    weight_pairs[grid](weight, terms, odd, N, M, *strides, width, ROWS=32, COLS=32, num_warps=4)
    for first, size in _blocks(R, 2 * width):
        rows = flat[first : first + size]
        for k in range(0, 2 * N, _LONGEST_OF_PAIRS):
            both = _product(numbers[first : first + size], terms, k, _LONGEST_OF_PAIRS)
            torch.add(both[:, width : width + M], rows if k else both[:, :M], out=rows)
            if k:
                rows += both[:, :M]
    tiles = -(-R // 32) * -(-M // 32)
    again_where_odd[(min(tiles, 512),)](odd, nu, weight, out, R, N, M, *strides, tiles, BLOCK=32, num_warps=4)
    return out


def _product(a: Tensor, b: Tensor, first: int, count: int) -> Tensor:
    """float32 product of ``count`` columns and rows, from ``first`` on, of the bf16 factors that int16 stand for."""
    a = a[:, first : first + count].view(torch.bfloat16)
    b = b[first : first + count].view(torch.bfloat16)
    if a.device.type == "cpu":  # Triton's interpreter; torch has no such product there
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _aligned(n: int) -> int:
    return (n + 7) // 8 * 8  # 16 bytes, as tensor cores read


def _blocks(rows: int, width: int) -> list[tuple[int, int]]:
    size = max(1024, _BLOCK_NUMBERS // width)
    return [(first, min(size, rows - first)) for first in range(0, rows, size)]
