"""How kernels are compiled: without the GIL, and cached on disk where the disk allows it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from numba import njit

log = logging.getLogger("snn_sparse_plugin")
_told = False


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: ``numba.njit(nogil=True, cache=True, **options)``, uncached where no folder can be written."""

    def compile_later(function: Callable[..., Any]) -> Any:
        global _told
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError as error:  # a read-only installation and no writable home
            if not _told:
                _told = True
                log.warning(
                    "compiled kernels are not cached (%s); set NUMBA_CACHE_DIR to a writable folder", error
                )
            return njit(nogil=True, **options)(function)

    return compile_later
