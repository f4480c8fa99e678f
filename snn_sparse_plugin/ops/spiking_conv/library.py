"""Dense inputs: torch's own convolution, a few steps at a time.

Of a convolution with a pool behind it only what the pool leaves is kept, with two bytes for each maximum that say where
it stood: maps of all steps would be the largest tensors of a training step. On a device this is how every input runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...core import bits
from ...core.convolution import Convolution
from ...core.csr import at_active
from ...core.host import is_device
from ...core.spikes import SpikeTrain
from .norm import Norm
from .reference import convolved, pooled, with_winners

CHUNK_BYTES, DEVICE_CHUNK_BYTES = 2**24, 2**28
"""How much a chunk's maps take: on a CPU what lies in its caches, on a device what keeps it busy."""

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def forward(
    conv: Convolution,
    x: Tensor | SpikeTrain,
    weight: Tensor,
    bias: Tensor | None,
    keep: bool,
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor | None]:
    """-> current (T, B, C', *out), and with ``keep`` where the maxima of a max-pool stood, as short as they fit."""
    T, B = x.shape[:2]
    if conv.pool is None and norm is None and isinstance(x, Tensor):  # nothing is larger than the result
        return convolved(conv, x.flatten(0, 1), weight, bias).unflatten(0, (T, B)), None
    current = weight.new_empty(T, B, conv.out_channels, *conv.out_size)
    winners = None
    if keep and conv.pool is not None and conv.pool.kind == "max":
        winners = torch.empty(current.shape, dtype=_place_dtype(conv), device=current.device)
    for steps in _chunks(conv, x):
        rows = _rows(conv, x, steps)
        if winners is None:
            made = convolved(conv, rows, weight, bias, norm)
        else:
            assert conv.pool is not None
            made, places = with_winners(conv.pool, convolved(conv.without_pool(), rows, weight, bias, norm))
            winners[steps] = places.unflatten(0, (-1, B))
        current[steps] = made.unflatten(0, (-1, B))
    return current, winners


def backward(
    conv: Convolution,
    x: Tensor | SpikeTrain,
    weight: Tensor,
    nu: Tensor,
    winners: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> Grads:
    """Gradients of input, weight and bias from that of the current; of a train at its active entries, or dense."""
    B = x.shape[1]
    grads: list[Tensor | None] = [None, None, None]
    if needs[0]:
        grads[0] = nu.new_empty(x.shape)
    for steps in _chunks(conv, x):
        spread = _spread(conv, nu[steps].flatten(0, 1), None if winners is None else winners[steps])
        rows = _rows(conv, x, steps)
        of_input, *sums = torch.ops.aten.convolution_backward(
            *(spread, rows, weight, [conv.out_channels], conv.stride, conv.padding, conv.dilation, False),
            *([0] * len(conv.size), conv.groups, list(needs)),
        )
        if needs[0]:
            grads[0][steps] = of_input.unflatten(0, (-1, B))  # type: ignore[index]
        for k, found in enumerate(sums, 1):
            if needs[k]:
                grads[k] = found if grads[k] is None else grads[k].add_(found)  # type: ignore[union-attr]
    if needs[0] and isinstance(x, SpikeTrain) and x.active is not None:
        grads[0] = at_active(grads[0].flatten(2), x.active)  # type: ignore[union-attr]
    for k, shape in ((1, weight.shape), (2, (conv.out_channels,))):
        if needs[k] and grads[k] is None:  # no step at all
            grads[k] = nu.new_zeros(shape)
    return grads[0], grads[1], grads[2]


def _place_dtype(conv: Convolution) -> torch.dtype:
    return torch.int16 if math.prod(conv.map_size) <= 2**15 else torch.int32


def _chunks(conv: Convolution, x: Tensor | SpikeTrain) -> Iterator[slice]:
    """All steps, a few at a time."""
    T, B = x.shape[:2]
    room = DEVICE_CHUNK_BYTES if is_device(x.device) else CHUNK_BYTES
    each = B * conv.out_channels * math.prod(conv.map_size) * x.dtype.itemsize
    n = max(1, room // max(1, each))
    return (slice(t, min(T, t + n)) for t in range(0, T, n))


def _rows(conv: Convolution, x: Tensor | SpikeTrain, steps: slice) -> Tensor:
    """The input of some steps, (steps · B, C, *size)."""
    some = _dense_steps(x, steps) if isinstance(x, SpikeTrain) else x[steps]
    return some.reshape(-1, conv.in_channels, *conv.size)


def _dense_steps(train: SpikeTrain, steps: slice) -> Tensor:
    if is_device(train.device) and train.values is None:
        return bits.unpack(train.words[steps], train.features).to(train.dtype)
    still = train.detach()
    return torch.stack([still.step(t) for t in range(steps.start, steps.stop)])


def _spread(conv: Convolution, nu: Tensor, winners: Tensor | None) -> Tensor:
    """The gradient of the maps (rows, C', *map), from that of what the pool left."""
    if conv.pool is None:
        return nu
    if winners is None:  # an average is linear
        maps = nu.new_zeros(len(nu), conv.out_channels, *conv.map_size).requires_grad_()
        with torch.enable_grad():
            out = pooled(conv.pool, maps)
        return torch.autograd.grad(out, maps, nu)[0]
    maps = nu.new_zeros(*nu.shape[:2], math.prod(conv.map_size))
    places = winners.reshape(*nu.shape[:2], -1).long()
    return maps.scatter_add_(2, places, nu.flatten(2)).unflatten(2, conv.map_size)
