"""How kernels are compiled: without the GIL, and cached on disk where the disk allows it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit

log = logging.getLogger("snn_sparse_plugin")
_told = False


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: ``numba.njit`` without the GIL, cached on disk unless no folder can be written.

    A division by zero gives infinity or NaN, as torch's does: a loop that has to raise is not vectorised (ten times
    slower).
    """
    options = {"nogil": True, "error_model": "numpy", **options}

    def compile_later(function: Callable[..., Any]) -> Any:
        global _told
        try:
            return _valid_with_sources(njit(cache=True, **options)(function))
        except RuntimeError as error:  # a read-only installation and no writable home
            if not _told:
                _told = True
                log.warning(
                    "compiled kernels are not cached (%s); set NUMBA_CACHE_DIR to a writable folder", error
                )
            return njit(**options)(function)

    return compile_later


def _valid_with_sources(dispatcher: Any) -> Any:
    """Let the cached code of a kernel count for these sources only.

    numba looks at the file of the kernel alone, but what it calls is compiled into it: after a change in another file
    cached kernels would disagree about arguments and crash.
    """
    file: Any = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if hasattr(file, "_source_stamp"):
        file._source_stamp = (file._source_stamp, sources())
    return dispatcher


@cache
def sources() -> str:
    """A digest of all files of this folder, in which every kernel stands."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
