"""The surrogate derivatives of ``snn_sparse_plugin.core.surrogates``, one branch a formula."""

import triton
import triton.language as tl


@triton.jit
def surrogate_grad(x, KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """sigma'(x), x = membrane - threshold; ``P0`` and ``P1`` are the parameters in upstream's order."""
    # constants are added to a block of x's dtype: a bare one would be a float32 block
    zero = tl.zeros_like(x)
    distance = tl.abs(x)
    if KIND == "zero":
        grad = zero
    elif KIND == "fast_sigmoid":
        root = P0 * distance + 1.0
        grad = 1.0 / (root * root)
    elif KIND == "atan":
        y = (1.5707963267948966 * P0) * x
        grad = (P0 / 2) / (y * y + 1.0)
    elif KIND == "sigmoid":
        decay = tl.exp(-P0 * distance)
        grad = P0 * decay / ((decay + 1.0) * (decay + 1.0))
    elif KIND == "straight_through":
        grad = zero + 1.0
    elif KIND == "triangular":
        grad = tl.where(x >= 0, zero - P0, zero + P0)
    elif KIND == "heaviside":
        grad = (x > 0).to(x.dtype)
    elif KIND == "spike_rate_escape":
        grad = P1 * tl.exp(-P0 * tl.abs(x - 1.0))
    elif KIND == "sparse_fast_sigmoid":
        root = P0 * distance + 1.0
        grad = tl.where(x > P1, 1.0 / (root * root), zero)
    elif KIND == "triangle":
        grad = P0 * tl.maximum(1.0 - distance, zero)
    elif KIND == "tanh":
        # from exp, which every target and the interpreter have; the sign of x does not matter to the square
        decay = tl.exp(-2 * P0 * distance)
        root = (1.0 - decay) / (1.0 + decay)
        grad = 1.0 - root * root
    elif KIND == "circ":
        square = x * x
        squares = square + P0 * P0
        root = tl.sqrt(squares)
        grad = (1.0 / (2.0 * root) - square / (2.0 * (squares * root))) * (2 * P0)
    else:
        tl.static_assert(KIND == "erfc", "unknown surrogate")
        y = P0 * x
        grad = 2.0 * tl.exp(-(y * y)) / 1.7724538509055159
    return grad
