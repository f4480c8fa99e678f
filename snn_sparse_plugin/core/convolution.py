"""Shapes of a convolution and of the pool behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Pool:
    """A pool, with one entry for each spatial dimension; the names are torch's."""

    kind: str  # "max" or "avg"
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...] = ()
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None

    def out_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """What is left of a map of this size."""
        widen = self.dilation or (1,) * len(self.kernel)
        return tuple(
            _pooled(*of, self.ceil_mode)
            for of in zip(size, self.kernel, self.stride, self.padding, widen, strict=True)
        )


@dataclass(frozen=True)
class Convolution:
    """A convolution of maps (in_channels, *size), padded by zeros, and a pool of what it makes."""

    in_channels: int
    out_channels: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    pool: Pool | None = None

    @property
    def map_size(self) -> tuple[int, ...]:
        """Of the convolution's output."""
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )

    @property
    def out_size(self) -> tuple[int, ...]:
        """After the pool."""
        return self.map_size if self.pool is None else self.pool.out_size(self.map_size)

    @property
    def in_features(self) -> int:
        return self.in_channels * math.prod(self.size)

    @property
    def out_features(self) -> int:
        return self.out_channels * math.prod(self.out_size)

    def without_pool(self) -> Convolution:
        return replace(self, pool=None)


def _pooled(n: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    free = n + 2 * padding - dilation * (kernel - 1) - 1
    out = -(-free // stride) + 1 if ceil_mode else free // stride + 1
    # the last window begins inside the map or its left padding
    return out - 1 if ceil_mode and (out - 1) * stride >= n + padding else out
