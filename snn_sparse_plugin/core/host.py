"""What Python may know of numbers that stand on a device."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .unseen import ALIASES

V = TypeVar("V")

_known: MutableMapping[Tensor, dict[Any, tuple[int, Any]]] = WeakIdKeyDictionary()


HOSTS = frozenset({"cpu"})


def is_device(device: torch.device) -> bool:
    """Whether it works on its own, so that to read a number of it is to wait, and what a CUDA graph cannot capture."""
    return device.type not in HOSTS


def waits(x: Tensor) -> bool:
    """Whether to read a number of this tensor is to wait for a device."""
    return is_device(x.device)


def known(x: Tensor, read: Callable[[Tensor], V]) -> V:
    """``read(x)`` of a parameter or buffer that hardly ever changes.

    Of a device it is read once, and again where the tensor was written to in place since, as its version tells. Behind
    a ``.data`` that somebody took it is read at each call.
    """
    if not waits(x) or ALIASES in x.untyped_storage().__dict__:
        return read(x)
    version = 0 if x.is_inference() else x._version
    found = _known.setdefault(x, {})
    if read not in found or found[read][0] != version:
        found[read] = version, read(x)
    return found[read][1]  # type: ignore[no-any-return]


def number(x: Any) -> float:
    """The number that a tensor of one element holds, or a number itself."""
    return known(x, float) if isinstance(x, Tensor) else float(x)
