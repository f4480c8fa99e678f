"""What every generated kernel is put together from: spikes as bits, division, surrogates inside their window."""

import triton
import triton.language as tl

from .surrogates import surrogate_grad


@triton.jit
def divide(a, b):
    """Rounded as IEEE says: Triton's own float32 division is faster and less exact."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def slope(x, everywhere, WINDOW: tl.constexpr, KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """The surrogate's derivative, zero outside the window unless it holds ``everywhere``."""
    phi = surrogate_grad(x, KIND, P0, P1)
    if WINDOW is not None:
        phi = tl.where((tl.abs(x) < WINDOW) | everywhere, phi, tl.zeros_like(phi))
    return phi


@triton.jit
def store_bits(words_ptr, bits, first_col, n_words, BLOCK: tl.constexpr):
    """Write BLOCK booleans from column ``first_col`` on into a row of words: neuron n is bit n % 32 of word n // 32."""
    bits = tl.reshape(bits.to(tl.int32), (BLOCK // 32, 32)) << tl.arange(0, 32)[None, :]
    words = first_col // 32 + tl.arange(0, BLOCK // 32)
    tl.store(words_ptr + words, tl.sum(bits, axis=1), mask=words < n_words)


@triton.jit
def lowest_bit(word):
    """The number of the lowest bit that is set."""
    # a power of two is exact in float32, and its exponent is the bit's number
    exponent = (word & -word).to(tl.float32).to(tl.int32, bitcast=True) >> 23
    return (exponent & 255) - 127


@triton.jit
def bf16_bits(x):
    """A float32 rounded to bf16, as the bits of a float32; what is not finite, or would not stay so, is cut."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = bits + 0x7FFF + ((bits >> 16) & 1)
    return tl.where(tl.abs(x) < 3e38, nearest, bits) & -65536


@triton.jit
def remainder(x, bits):
    """What :func:`bf16_bits` left of x. Nothing is left of an infinite number, and NaN of NaN."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x - bits.to(tl.float32, bitcast=True))


@triton.jit
def paired(x):
    """A float32 as a pair of bf16 numbers in the same 32 bits: their sum is x to 2^-17 of it, the upper one the larger.

    In memory the smaller comes first: (R, N) floats are (R, 2 N) bf16 numbers.
    """
    high = bf16_bits(x)
    low = bf16_bits(remainder(x, high))
    return (high | ((low >> 16) & 0xFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def unpaired(x):
    """The sum of a pair."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits & -65536).to(tl.float32, bitcast=True) + (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def gather_rows(
    acc, words_ptr, first, last, values_ptr, step, table_ptr, stride, cols, mask, PAIRS: tl.constexpr = False
):
    """``acc`` plus one row of the table, ``stride`` long, for every bit set in words ``first`` to ``last``.

    A row counts as often as the value of its bit says, ``step`` apart from the next one's; all are 1 where it is None.
    ``PAIRS``: the table holds pairs of bf16 numbers.
    """
    for k in range(first, last):
        word = tl.load(words_ptr + k)
        while word != 0:
            bit = (k * 32 + lowest_bit(word)).to(tl.int64)
            row = tl.load(table_ptr + bit * stride + cols, mask=mask, other=0.0)
            row = unpaired(row) if PAIRS else row.to(acc.dtype)
            if values_ptr is not None:
                row = row * tl.load(values_ptr + bit * step).to(acc.dtype)
            acc += row
            word = word ^ (word & -word)
    return acc


@triton.jit
def write_step(
    site,
    s,
    membrane,
    near,
    row,
    first,
    cols,
    mask,
    N,
    n_words,
    words_ptr,
    spikes_ptr,
    mem_ptr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what a step of a spiking neuron gave; -> how often each came near the threshold so far."""
    if WINDOW is not None:
        near += ((tl.abs(site) < WINDOW) & mask).to(tl.int32)
    if words_ptr is not None:
        store_bits(words_ptr + row * n_words, (s > 0) & mask, first, n_words, BLOCK)
    if spikes_ptr is not None:
        tl.store(spikes_ptr + row * N + cols, s, mask=mask)
    if mem_ptr is not None:
        tl.store(mem_ptr + row * N + cols, membrane, mask=mask)
    return near


@triton.jit
def recurrent_current(
    t, rec_weight_ptr, rec_bias_ptr, rec0_ptr, words_ptr, row, b, B, n_words, width, cols, mask, like
):
    """What the layer's spikes of the step before feed back; at the first step it is given. Rows are ``width`` long."""
    if t == 0:
        rec = tl.load(rec0_ptr + b * width + cols, mask=mask, other=0.0).to(like.dtype)
    else:
        rec = tl.zeros_like(like)
        if rec_bias_ptr is not None:
            rec = tl.load(rec_bias_ptr + cols, mask=mask, other=0.0).to(like.dtype)
        words_ptr += (row - B) * n_words
        rec = gather_rows(rec, words_ptr, 0, n_words, None, 0, rec_weight_ptr, width, cols, mask)
    return rec


@triton.jit
def some_back(g_s, bits_ptr, n_words, nu, rec_weight_t_ptr, width, first, cols, mask, WORDS: tl.constexpr):
    """``g_s`` (1, BLOCK) plus W_rec^T nu of one input current, for the neurons whose bit is set: a dot product each.

    WORDS words are taken at a time, and of each its lowest bit: as many products go through one sum.
    """
    for k in range(0, n_words, WORDS):
        place = k + tl.arange(0, WORDS)
        words = tl.load(bits_ptr + place, mask=place < n_words, other=0)
        left = tl.sum((words != 0).to(tl.int32), axis=0)
        while left > 0:
            live = (words != 0)[:, None]
            m = (place * 32 + tl.where(words != 0, lowest_bit(words), 0))[:, None]
            weight_ptr = rec_weight_t_ptr + m.to(tl.int64) * width + first
            weight = tl.load(weight_ptr + cols, mask=live & mask, other=0.0)
            found = tl.sum(weight * nu, axis=1)[:, None]
            g_s += tl.sum(tl.where(live & (cols == m), found, 0.0), axis=0)[None, :]
            words = words & (words - 1)
            left = tl.sum((words != 0).to(tl.int32), axis=0)
    return g_s
