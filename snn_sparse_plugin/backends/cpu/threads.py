"""A small thread pool for nogil kernels: safe under autograd's threads and after fork.

numba's own parallel layers are not: workqueue aborts when two threads enter it, OpenMP hangs after fork.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_pool: ThreadPoolExecutor | None = None
_size = 0


def _forget() -> None:
    global _pool, _size
    _pool, _size = None, 0


os.register_at_fork(after_in_child=_forget)


def split(n: int, parts: int | None = None) -> list[tuple[int, int]]:
    """``n`` items as contiguous ranges, one per torch thread (at least one, possibly empty)."""
    parts = max(1, min(parts or torch.get_num_threads(), n))
    bounds = [n * k // parts for k in range(parts + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def parallel(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run the tasks at once, the first on this thread; their results in order. Tasks must not nest."""
    global _pool, _size
    if len(tasks) == 1:
        return [tasks[0]()]
    if _pool is None or _size < len(tasks) - 1:
        _size = len(tasks) - 1
        _pool = ThreadPoolExecutor(_size, thread_name_prefix="snn-sparse")
    futures = [_pool.submit(task) for task in tasks[1:]]
    first = tasks[0]()
    return [first, *(future.result() for future in futures)]
