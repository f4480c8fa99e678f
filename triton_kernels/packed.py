"""Bit-packed spikes inside kernels: neuron n is bit ``n % 32`` of the int32 word ``n // 32``."""

import triton
import triton.language as tl


@triton.jit
def store_packed(words_ptr, s, first_col, n_words, BLOCK_N: tl.constexpr):
    """Write the spikes ``s`` of BLOCK_N neurons from ``first_col`` on into the row at ``words_ptr``."""
    bits = tl.reshape(s.to(tl.int32), (BLOCK_N // 32, 32)) << tl.arange(0, 32)[None, :]
    words = first_col // 32 + tl.arange(0, BLOCK_N // 32)
    tl.store(words_ptr + words, tl.sum(bits, axis=1), mask=words < n_words)


@triton.jit
def gather_rows(acc, words_ptr, n_words, weight_ptr, N, cols, mask):
    """``acc`` plus one row of the weights (M, N) for every bit set in the words: cost follows the spikes."""
    for k in range(n_words):
        word = tl.load(words_ptr + k)
        while word != 0:
            lowest = word & -word
            # a power of two is exact in float32, and its exponent is the bit's number
            exponent = lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23
            row = (k * 32 + ((exponent & 255) - 127)).to(tl.int64)
            acc += tl.load(weight_ptr + row * N + cols, mask=mask, other=0.0)
            word = word ^ lowest
    return acc
