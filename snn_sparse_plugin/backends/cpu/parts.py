"""Parts of kernels are compiled as far as kernels need them: to LLVM's own code, not to the machine's.

Nobody calls a part, and LLVM optimises it again in each kernel that it goes into. Without its own last passes and its
machine code all kernels of a training step compile in about a tenth less time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.registry import cpu_target


@contextmanager
def kept_as(part: bool) -> Iterator[None]:
    """Meanwhile what numba compiles, or loads from disk, is a part, or a kernel; under numba's lock."""
    codegen: Any = cpu_target.target_context.codegen()
    before = codegen._library_class
    codegen._library_class = _Part if part else JITCodeLibrary
    try:
        yield
    finally:
        codegen._library_class = before


class _Part(JITCodeLibrary):
    """Code to link into others, which no engine runs."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0

    def serialize_using_object_code(self) -> Any:
        return self.serialize_using_bitcode()

    @property
    def codegen(self) -> Any:
        return _NoEngine(self._codegen)


class _NoEngine:
    """A code generator to which numba cannot say where a part's Python objects are: it has none."""

    def __init__(self, codegen: Any) -> None:
        self._codegen = codegen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codegen, name)

    def set_env(self, name: str, env: Any) -> None:
        pass
