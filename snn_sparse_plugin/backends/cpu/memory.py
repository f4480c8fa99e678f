"""Memory of tensors as numpy arrays for kernels."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from ...core.unseen import PINNED

_TYPES: dict[torch.dtype, np.dtype] = {
    torch.float32: np.dtype("float32"),
    torch.float64: np.dtype("float64"),
    torch.int64: np.dtype("int64"),
    torch.int32: np.dtype("int32"),
    torch.uint8: np.dtype("uint8"),
    torch.bool: np.dtype("bool"),
}


LARGEST = 1 << 19
"""Numbers up to which numpy makes a copy in order: torch would wake its threads, which takes longer and is in the way
of ours (see threads.py)."""


class _Memory(ctypes.c_char * (1 << 46)):  # as large as an address space: only the array knows its size
    """Memory of a tensor, which it keeps for as long as there is an array."""

    __slots__ = ("tensor",)


_at, _new = _Memory.from_address, np.ndarray


_ARRAY = "_snn_array"


def tensor(x: np.ndarray) -> Tensor:
    """``torch.from_numpy(x)``, of which :func:`array` knows where its numbers are: for what a backward alone will read,
    as who saves a tensor saves what is known of it."""
    made = torch.from_numpy(x)
    made._snn_array = made.data_ptr(), x  # type: ignore[attr-defined]
    return made


def array(x: Tensor, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The numbers of a CPU tensor, without a copy where it is contiguous, in another shape if one is given.

    ``Tensor.numpy`` would note on the memory, for good, that something outside torch may write to it: torch then
    resizes it no more, and time fusion has to copy it (:mod:`snn_sparse_plugin.core.unseen`).
    """
    known = getattr(x, _ARRAY, None)
    if known is not None and shape is None and known[0] == x.data_ptr():
        return known[1]  # type: ignore[no-any-return]
    kind, strides = _TYPES[x.dtype], None
    if not x.is_contiguous():
        if x.numel() > LARGEST or x.is_neg():
            x = x.detach().contiguous()
        else:
            strides = [step * kind.itemsize for step in x.stride()]
    # half of the time of numpy's array interface; a call asks for twenty arrays
    memory = _at(x.data_ptr())
    memory.tensor = x
    if strides is not None:
        kept = np.ascontiguousarray(_new(x.shape, kind, memory, 0, strides))
        return kept if shape is None else kept.reshape(shape)
    return _new(x.shape if shape is None else shape, kind, memory)


def pinned(x: Tensor) -> np.ndarray:
    """:func:`array` for a thread of its own: torch does not move the memory from now on."""
    storage = x.untyped_storage()
    if storage.resizable():
        setattr(storage, PINNED, True)
    return torch._C.TensorBase.numpy(x.detach())  # type: ignore[no-any-return]
