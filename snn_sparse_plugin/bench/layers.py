"""Layers as the field writes them: ``200`` neurons behind a linear layer, ``"12C5-MP2"`` maps behind a convolution."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import ConfigError

Shape = tuple[int, ...]

_CONVOLUTION = re.compile(r"(\d+)C(\d+)(?:p(\d+))?(?:-MP(\d+))?")


@dataclass(frozen=True)
class Layer:
    """A linear layer of ``outputs`` neurons, or a convolution of as many channels and the max-pool behind it."""

    outputs: int
    kernel: int = 0
    padding: int = 0
    pool: int = 1

    @classmethod
    def parse(cls, given: int | str) -> Layer:
        """``200``, or ``"12C5"``: 12 channels, a kernel of 5 × 5; ``p1`` pads by 1, ``-MP2`` pools by 2.

        Raises:
            ConfigError: anything else.

        Example:
            >>> Layer.parse("64C3p1-MP2")
            Layer(outputs=64, kernel=3, padding=1, pool=2)
        """
        found = _CONVOLUTION.fullmatch(given) if isinstance(given, str) else None
        if found is not None:
            channels, kernel, padding, pool = (int(n) if n else None for n in found.groups())
            layer = cls(channels or 0, kernel or 0, padding or 0, 1 if pool is None else pool)
            if min(layer.outputs, layer.kernel, layer.pool) > 0:
                return layer
        elif isinstance(given, int) and given > 0:
            return cls(given)
        raise ConfigError(
            f"a layer is a number of neurons or a convolution such as 64C3p1-MP2, got {given!r}."
        )

    def weight_shape(self, size: Shape) -> Shape:
        """Of its weight, for an input (*size) of one sample and step."""
        if not self.kernel:
            return self.outputs, math.prod(size)
        return self.outputs, size[0], self.kernel, self.kernel

    def out_size(self, size: Shape) -> Shape:
        """What it makes of an input (*size): neurons, or channels and map.

        Raises:
            ConfigError: a convolution that has no map of two dimensions, or one that is too small.
        """
        if not self.kernel:
            return (self.outputs,)
        sides = tuple((n + 2 * self.padding - self.kernel + 1) // self.pool for n in size[1:])
        if len(sides) != 2 or min(sides) < 1:
            raise ConfigError(f"a convolution {self} does not fit an input of {size}.")
        return self.outputs, *sides

    def current(self, x: Tensor, weight: Tensor) -> Tensor:
        """Of inputs (T, B, *size), in plain torch."""
        if not self.kernel:
            return F.linear(x.flatten(2), weight)
        maps = F.conv2d(x.flatten(0, 1), weight, padding=self.padding)
        return (maps if self.pool == 1 else F.max_pool2d(maps, self.pool)).unflatten(0, x.shape[:2])

    def modules(self, size: Shape, device: str) -> list[nn.Module]:
        """Those that a user puts before the neurons."""
        if self.kernel:
            conv = nn.Conv2d(size[0], self.outputs, self.kernel, padding=self.padding, device=device)
            return [conv] if self.pool == 1 else [conv, nn.MaxPool2d(self.pool)]
        linear = nn.Linear(math.prod(size), self.outputs, device=device)
        return [linear] if len(size) == 1 else [nn.Flatten(), linear]


def written(size: int | Shape, layers: tuple[int | str, ...]) -> str:
    """A network in one word.

    Example:
        >>> written((1, 28, 28), ("12C5-MP2", 10))
        '1×28×28-12C5-MP2-10'
    """
    first = str(size) if isinstance(size, int) else "×".join(map(str, size))
    return "-".join((first, *map(str, layers)))
