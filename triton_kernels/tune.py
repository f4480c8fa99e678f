"""Measures where one way to multiply begins to beat another on the card at hand, for the table of :mod:`.crossovers`.

Every way is timed with all it needs: rows turn the weight and pack a dense input, terms split the weight and unpack
bits. A dense input is timed with the weight's gradient, which goes the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import triton
from torch import Tensor

from . import products, terms
from .crossovers import Crossovers, Limits

Timer = Callable[[Callable[[], object]], float]

WIDTHS = ((200, 256), (1000, math.inf))  # inputs and outputs of a product, and the widest that it stands for
ROWS = (2000, 8000, 32000)
DENSITIES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)


def milliseconds(run: Callable[[], object]) -> float:
    """The median time of a call on the device."""
    return float(triton.testing.do_bench(run, warmup=20, rep=60, return_mode="median"))


def measure(
    device: torch.device,
    *,
    widths: Sequence[tuple[int, float]] = WIDTHS,
    rows: Sequence[int] = ROWS,
    timer: Timer = milliseconds,
    tell: Callable[[str], object] = print,
) -> Crossovers:
    """The table of a device.

    Args:
        widths: as :data:`WIDTHS`; the last stands for all that is wider.
        rows: T * B of the products that say from which size on bf16 terms pay; densities are measured with the most.
        timer: milliseconds of a call.
        tell: takes a line of text for each product.
    """
    found: dict[str, list[tuple[float, float]]] = {"float32": [], "TF32": [], "bf16 terms": []}
    for width, widest in widths:
        for way, density in _densities(device, max(rows), width, timer):
            found[way].append((widest, density))
            tell(f"{max(rows)} x {width} -> {width}: rows beat {way} below {100 * density:.3g} %")
    smallest = math.inf
    for size, won in sorted(_sizes(device, rows, [width for width, _ in widths], timer), reverse=True):
        tell(f"{size:.3g} multiply-adds: bf16 terms {'beat' if won else 'do not beat'} float32")
        if not won:
            break
        smallest = size
    limits: list[Limits] = [tuple(pairs) for pairs in found.values()]
    return Crossovers(*limits, terms_from=smallest)


def _densities(device: torch.device, R: int, width: int, timer: Timer) -> Iterator[tuple[str, float]]:
    """Below which density rows beat each other way."""
    weight, nu = (torch.randn(n, width, device=device) for n in (width, R))
    nu = nu.view(R, 1, width)
    of_dense, of_bits = [], []
    for density in DENSITIES:
        x = (torch.rand(R, 1, width, device=device) < density).float()
        words = products.packed(x)
        of_dense.append(timer(partial(_by_rows, x, weight, nu)))
        of_bits.append(timer(partial(products.current, words, None, weight, None)))
    for name, tf32 in (("float32", False), ("TF32", True)):
        with _precision(tf32):
            yield name, crossing(of_dense, timer(partial(_by_library, x, weight, nu)))
    yield "bf16 terms", crossing(of_bits, timer(partial(terms.current, words, weight, None)))


def _by_rows(x: Tensor, weight: Tensor, nu: Tensor) -> None:
    words = products.packed(x)
    products.current(words, x, weight, None)
    products.weight_gradient(nu, words, x, weight.shape[1])


def _by_library(x: Tensor, weight: Tensor, nu: Tensor) -> None:
    torch.nn.functional.linear(x, weight)
    nu.flatten(0, 1).t() @ x.flatten(0, 1)


def crossing(times: Sequence[float], other: float) -> float:
    """The density at which ``times``, for :data:`DENSITIES`, reach ``other``: 0 where all are longer, 1 where none."""
    if times[0] >= other:
        return 0.0
    for k in range(1, len(times)):
        if times[k] >= other:
            share = (other - times[k - 1]) / (times[k] - times[k - 1])
            return DENSITIES[k - 1] + share * (DENSITIES[k] - DENSITIES[k - 1])
    return 1.0


def _sizes(
    device: torch.device, rows: Sequence[int], widths: Sequence[int], timer: Timer
) -> Iterator[tuple[int, bool]]:
    """Multiply-adds of the input's gradient, and whether bf16 terms make it sooner than a float32 product."""
    odd = torch.zeros(1, dtype=torch.int32, device=device)
    for width in widths:
        weight = torch.randn(width, width, device=device)
        for R in rows:
            nu = torch.randn(R, 1, width, device=device)
            high = nu.bfloat16()
            pairs = torch.stack([(nu - high).bfloat16(), high], -1).view(torch.float32).squeeze(-1)
            with _precision(False):
                float32 = timer(partial(torch.matmul, nu, weight))
            won = timer(partial(terms.input_gradient, pairs, odd, weight)) < float32
            yield R * width * width, won


@contextmanager
def _precision(tf32: bool) -> Iterator[None]:
    """Products of the library in TF32, or not."""
    matmul = torch.backends.cuda.matmul
    name, value = "allow_tf32", tf32
    if hasattr(matmul, "fp32_precision"):
        name, value = "fp32_precision", "tf32" if tf32 else "ieee"
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)
