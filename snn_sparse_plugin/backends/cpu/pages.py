"""Huge pages for large new outputs: faulting in 40 MB by pages of 4 KB takes as long as computing it."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

from torch import Tensor

_LARGE = 1 << 23  # bytes; below, torch's allocator mostly hands out memory that has been used before
_PAGE = 4096
_MADV_HUGEPAGE = 14


@cache
def _madvise() -> Any:
    """Linux's ``madvise``, or None."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function


def advise_huge_pages(x: Tensor) -> None:
    """Ask for huge pages behind a contiguous CPU tensor that nothing has been written to; only advice, so no error."""
    size = x.numel() * x.element_size()
    madvise = _madvise() if size >= _LARGE else None
    if madvise is not None:
        begin = -(-x.data_ptr() // _PAGE) * _PAGE
        madvise(begin, (x.data_ptr() + size - begin) // _PAGE * _PAGE, _MADV_HUGEPAGE)
