"""The convolution of an op in plain torch: its specification, and what runs under transforms and for second
derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...core.convolution import Convolution, Pool
from .norm import Norm

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_MAX = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE: tuple[Callable[..., Tensor], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def convolved(
    conv: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None = None
) -> Tensor:
    """Convolution, batch norm and pooling of samples (rows, C, *size) -> (rows, C', *out)."""
    x = _CONV[len(conv.size) - 1](x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    x = x if norm is None else norm.of_maps(x)
    return x if conv.pool is None else pooled(conv.pool, x)


def pooled(pool: Pool, x: Tensor) -> Tensor:
    """Pooling of maps (rows, C, *map)."""
    at = len(pool.kernel) - 1
    if pool.kind == "max":
        out: Tensor = _MAX[at](x, pool.kernel, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
        return out
    options: tuple[Any, ...] = (
        pool.kernel,
        pool.stride,
        pool.padding,
        pool.ceil_mode,
        pool.count_include_pad,
    )
    if at:  # only these take it
        options += (pool.divisor_override,)
    out = _AVERAGE[at](x, *options)
    return out


def with_winners(pool: Pool, x: Tensor) -> tuple[Tensor, Tensor]:
    """Max-pooling of maps (rows, C, *map), and where in its map each maximum stands, int64."""
    found: tuple[Tensor, Tensor] = _MAX[len(pool.kernel) - 1](
        *(x, pool.kernel, pool.stride, pool.padding, pool.dilation, pool.ceil_mode), return_indices=True
    )
    return found
