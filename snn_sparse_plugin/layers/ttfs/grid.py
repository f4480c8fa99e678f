"""The binary grid on which sums are exact, so that every order of summation gives the same membrane.

With values on 2^-k, weights on 2^-a and biases on 2^-(a+k), every partial sum is a multiple of 2^-(a+k); where
Σ|w·value| + |b| < 2^(p-a-k), p the bits of the significand, all of them are floating numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ...core.errors import UnsupportedError
from .stages import Stage

_LEAST = 4  # bits after the point that a value keeps beyond the smallest


def _bits(table: Tensor) -> int:
    """Bits after the point of a table on a grid: enough for its smallest entry, and a few more."""
    return max(0, math.ceil(-math.log2(float(table.min())))) + _LEAST


def _round(x: Tensor, bits: int) -> Tensor:
    return torch.ldexp(torch.round(torch.ldexp(x.double(), torch.tensor(bits))), torch.tensor(-bits)).to(
        x.dtype
    )


def on_grid(encoder: Tensor, stages: list[Stage]) -> tuple[Tensor, list[Stage]]:
    """See :meth:`TTFSNetwork.on_grid`."""
    encoder = _round(encoder, _bits(encoder))
    arriving, gridded = encoder, []
    for stage in stages:
        table = None if stage.table is None else _round(stage.table, _bits(stage.table))
        gridded.append(replace(_gridded(stage, arriving), table=table))
        arriving = arriving if table is None else table
    return encoder, gridded


def _gridded(stage: Stage, arriving: Tensor) -> Stage:
    """The stage with weights and biases on the finest grid that keeps its sums exact."""
    significand = {torch.float32: 24, torch.float64: 53}[stage.weight.dtype]
    value_bits = _bits_of(arriving[1])
    if stage.average is not None:
        cells = math.prod(stage.average.kernel)
        if cells & (cells - 1):
            raise UnsupportedError(
                f"{stage.name}: an average over {cells} cells is not a binary fraction, so no grid makes it exact: "
                "pool over 2×2 or 4×4."
            )
        value_bits += int(math.log2(cells))
    bias = 0.0 if stage.bias is None else stage.bias.abs().double()
    bound = stage.weight.abs().double().flatten(1).sum(1) * float(arriving[1, 0]) + bias
    if not bool(torch.isfinite(bound).all()):
        raise UnsupportedError(
            f"{stage.name}: its sums are too large, or its values too small, for any grid."
        )
    # rounding a weight may add half a step to each; a bit of room covers it
    room = math.ceil(math.log2(max(float(bound.max()), 1e-30))) + 1
    bits = min(significand - room - value_bits, significand + 8)
    if bits < 3:
        raise UnsupportedError(
            f"{stage.name}: sums of up to {float(bound.max()):.3g} and values on 2^-{value_bits} leave {bits} bits "
            f"for the weights in {stage.weight.dtype}: verify net.to(torch.float64) instead."
        )
    return replace(
        stage,
        weight=_round(stage.weight, bits),
        bias=None if stage.bias is None else _round(stage.bias, bits + value_bits),
    )


def _bits_of(values: Tensor) -> int:
    """Bits after the point that the values use."""
    bits = 0
    while not torch.equal(_round(values, bits), values):
        bits += 1
    return bits
