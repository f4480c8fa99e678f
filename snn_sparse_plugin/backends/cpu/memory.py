"""Memory of tensors as numpy arrays for kernels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_TYPES = {
    torch.float32: "<f4",
    torch.float64: "<f8",
    torch.int64: "<i8",
    torch.int32: "<i4",
    torch.uint8: "|u1",
    torch.bool: "|b1",
}


class _Memory:
    """What numpy asks for; it keeps the tensor for as long as there is an array."""

    __slots__ = ("__array_interface__", "tensor")

    def __init__(self, x: Tensor) -> None:
        self.tensor = x
        self.__array_interface__ = {
            "data": (x.data_ptr(), False),
            "shape": tuple(x.shape),
            "typestr": _TYPES[x.dtype],
            "version": 3,
        }


def array(x: Tensor) -> np.ndarray:
    """The numbers of a CPU tensor, without a copy where it is contiguous.

    ``Tensor.numpy`` would note on the memory, for good, that something outside torch may write to it: torch then
    resizes it no more, and time fusion has to copy it (:mod:`snn_sparse_plugin.fusion.aliases`).
    """
    return np.asarray(_Memory(x if x.is_contiguous() else x.detach().contiguous()))


PINNED = "_snn_sparse_pinned"
"""Attribute of storages that torch resizes no more because of :func:`pinned`, not because others may write to them."""


def pinned(x: Tensor) -> np.ndarray:
    """:func:`array` for a thread of its own: torch does not move the memory from now on."""
    storage = x.untyped_storage()
    if storage.resizable():
        setattr(storage, PINNED, True)
    return torch._C.TensorBase.numpy(x.detach())  # type: ignore[no-any-return]
