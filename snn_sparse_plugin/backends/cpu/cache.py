"""Compiled kernels on disk: a convenience that never ends a program, whatever happens to the folder.

numba's own cache raises where the disk is full or a file is damaged, loads machine code without looking whether it is
whole, and two processes that compile at once may store one kernel under the other's signature.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import sys
import zlib
from functools import cache
from glob import escape
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

from .notice import Notice
from .parts import kept_as

log = logging.getLogger("snn_sparse_plugin")
_told = False
_notice: Notice | None = None


class KernelCache(FunctionCache):
    """The cache of one kernel, valid for one state of all sources; what fails in it counts as not there.

    Raises:
        RuntimeError: there is no folder that can be written.
    """

    def __init__(self, function: Any, sources: str, part: bool = False) -> None:
        super().__init__(function)
        self._part = part
        # numba looks at the file of the kernel alone, but what it calls is compiled into it: after a change in
        # another file cached kernels would disagree about arguments and crash
        stamp = self._cache_file._source_stamp, sources
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, stamp)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        # numba's own key pickles what a function closes over, and a pickled dispatcher holds a number that is another
        # in every process: no kernel made of parts would be found again
        return sig, codegen.magic_tuple(), hashlib.sha256(repr(_identity(self._py_func)).encode()).hexdigest()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        global _notice
        try:
            # numba's own method first registers all that a compilation may ask for, half a second that a kernel from
            # disk does not need; a compilation does it, too
            rtsys.initialize(target_context)
            with kept_as(self._part):
                found = self._load_overload(sig, target_context)
        except Exception as error:
            log.debug("%s is compiled again: %s", self._name, error)
            found = None
        if found is None:  # what follows is its compilation, under numba's lock
            spare_scipy()
            if _notice is None:
                _notice = Notice(self, self._py_func.__name__)
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        global _notice
        if _notice is not None and _notice.owner is self:
            _notice.end(self.cache_path)
            _notice = None
        try:
            super().save_overload(sig, data)
        except Exception as error:
            not_cached(self.cache_path, error)


@cache
def spare_scipy() -> None:
    """Import numba's array functions without scipy.linalg (30 MB), which they import to see whether it is there: that
    scipy is there must do. What multiplies matrices in numba asks for it again.
    """
    linalg = import_module("numba.np.linalg")
    ask = getattr(linalg, "ensure_blas", None)
    if "numba.np.arraymath" in sys.modules or "scipy" not in sys.modules or ask is None:
        return
    linalg.ensure_blas = lambda: None  # type: ignore[attr-defined]
    try:
        import_module("numba.np.arraymath").ensure_blas = ask  # type: ignore[attr-defined]
    finally:
        linalg.ensure_blas = ask  # type: ignore[attr-defined]


def _identity(x: Any) -> Any:
    """What tells a function from others of the same sources: its code and, in turn, what it closes over."""
    function = getattr(x, "py_func", x)
    if not isinstance(function, FunctionType):
        return x
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    code = function.__code__
    return function.__module__, function.__qualname__, code.co_code, tuple(_identity(cell) for cell in cells)


class _Files(IndexDataCacheFile):
    """A file for each signature, named by it, that holds everything it is valid for and a checksum.

    So there is no index that writers could race for, and a file is replaced as a whole or not at all.
    """

    def __init__(self, folder: str, base: str, stamp: Any) -> None:
        super().__init__(folder, base, stamp)
        self._base = base

    def _path(self, key: Any) -> Path:
        # the signature, the machine, and hashes of the kernel's code and of what it closes over
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:20]
        return Path(self._cache_path) / f"{self._base}.{name}.nbc"

    def save(self, key: Any, data: Any) -> None:
        content = dumps((self._version, self._source_stamp, key, data))
        with self._open_for_write(str(self._path(key))) as file:
            file.write(zlib.crc32(content).to_bytes(4, "little") + content)

    def load(self, key: Any) -> Any:
        try:
            stored = self._path(key).read_bytes()
        except OSError:
            return None
        content = memoryview(stored)[4:]
        if zlib.crc32(content) != int.from_bytes(stored[:4], "little"):
            return None
        version, stamp, of, data = pickle.loads(content)
        return data if (version, stamp, of) == (self._version, self._source_stamp, key) else None

    def flush(self) -> None:
        for path in Path(self._cache_path).glob(f"{escape(self._base)}.*.nbc"):
            path.unlink(missing_ok=True)


def not_cached(folder: str, error: BaseException) -> None:
    """Say, once in a process, that kernels are compiled in memory only."""
    global _told
    if not _told:
        _told = True
        log.warning(
            "compiled kernels are not cached in %s (%s), so every process compiles them again: make room there, or set "
            "NUMBA_CACHE_DIR to a folder that can be written",
            folder,
            error,
        )
