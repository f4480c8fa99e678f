"""How kernels are compiled: without the GIL, and cached on disk where the disk allows it."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numba
from numba import njit
from numba.core import ir, types
from numba.core.compiler import CompilerBase, DefaultPassBuilder

from .cache import KernelCache, not_cached, spare_scipy
from .parts import kept_as

_config: Any = numba.config
KERNEL, PART = 2, 1
"""How hard LLVM tries. Numba's own level, the third, takes about a tenth more of LLVM's time and gives nothing, as what
is hot is written in vectors. A part is optimised again in each kernel that it goes into."""


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: ``numba.njit`` without the GIL, cached on disk unless no folder can be written.

    With ``part`` or ``forceinline`` it is compiled into kernels alone: what would let Python call it takes a third of
    the time. Parts are on disk too, for other kernels.

    It counts no references to its arrays, which in a part takes as long, at each row, as adding two of them, and in a
    kernel a tenth of its compilation. One that makes an array, returns one, or calls a part that returns one says that
    it ``allocates``, as otherwise the array would never be freed, or too early. Python hands kernels of the usual
    layers all rows that they need.

    A division by zero gives infinity or NaN, as torch's does: a loop that has to raise is not vectorised (ten times
    slower).
    """
    part = options.pop("part", options.get("forceinline", False))
    allocates = options.pop("allocates", False)
    options = {
        "_nrt": allocates,
        "nogil": True,
        "error_model": "numpy",
        "no_cfunc_wrapper": True,
        "pipeline_class": _Passes,
        **options,
    }
    options["no_cpython_wrapper"] = part

    def compile_later(function: Callable[..., Any]) -> Any:
        dispatcher = njit(**options)(function)
        if hasattr(dispatcher, "_cache"):  # not under NUMBA_DISABLE_JIT
            dispatcher._compiler.compile = partial(_compile, part, allocates, dispatcher._compiler.compile)
            try:
                dispatcher._cache = KernelCache(function, sources(), part)
            except (RuntimeError, OSError) as error:  # a read-only installation and no writable home
                not_cached("any folder", error)
                spare_scipy()
        return dispatcher

    return compile_later


class _Passes(CompilerBase):
    """Numba's passes but for those that look, in each function, for what no kernel has."""

    _NEEDLESS = frozenset(
        {
            "with_lifting",  # blocks in object mode
            "inline_closure_likes",  # comprehensions and functions in functions
            "inline_overloads",
            "find_literally",
            "literal_unroll",
            "LiteralPropagation",
            "nopython_rewrites",  # one loop for an expression of whole arrays
        }
    )

    def define_pipelines(self) -> list[Any]:
        passes: Any = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.passes = [(each, what) for each, what in passes.passes if each.name() not in self._NEEDLESS]
        passes.finalize()
        return [passes]


def _compile(part: bool, allocates: bool, compile: Callable[..., Any], *args: Any) -> Any:
    """Compile something, under numba's lock; NUMBA_OPT has its way.

    Meanwhile no garbage is collected: Python would look a hundred times, for a seventh of the time, at what numba has
    built and still needs.
    """
    before, collects = _config.OPT, gc.isenabled()
    if "NUMBA_OPT" not in os.environ:
        _config.OPT = type(before)(PART if part else KERNEL)
    try:
        gc.disable()
        with kept_as(part):
            found = compile(*args)
        if not allocates:
            _refuse_arrays(found)
        return found
    finally:
        _config.OPT = before
        if collects:
            gc.enable()


def _refuse_arrays(found: Any) -> None:
    """Raise :class:`TypeError` where arrays come out of a function, or out of one that it calls: see ``kernel``."""
    typed = found.type_annotation
    given = [
        signature.return_type
        for node, signature in typed.calltypes.items()
        if isinstance(node, ir.Expr)
        and node.op == "call"
        and isinstance(typed.typemap[node.func.name], types.Dispatcher)
    ]
    if any(map(_has_array, [found.signature.return_type, *given])):
        name = found.fndesc.qualname
        raise TypeError(
            f"{name} returns an array, or calls a part that does: it has to say that it allocates"
        )


def _has_array(kind: Any) -> bool:
    inner: Any = kind if isinstance(kind, types.BaseTuple) else ()
    return isinstance(kind, types.Array) or any(map(_has_array, inner))


def cache_folder() -> Path | None:
    """Where compiled kernels are kept; None where no folder can be written."""
    try:
        return Path(KernelCache(cache_folder, "").cache_path)
    except (RuntimeError, OSError):
        return None


@cache
def sources() -> str:
    """A digest of all files of this folder, in which every kernel stands."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
