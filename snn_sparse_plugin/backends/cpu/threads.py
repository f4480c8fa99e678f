"""Run nogil kernels on several threads: on torch's own OpenMP team where it can be found, else on a thread pool.

torch's OpenMP threads spin for milliseconds after each of its parallel operations. A pool of our own would share
their cores while they do (measured: twice the time of a training step on two cores); handing the work to the
spinning threads themselves costs nothing and starts at once. numba's parallel layers are no way out: workqueue
aborts when two threads enter it, and numba's OpenMP layer is a second team beside torch's.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_forked = False


def _after_fork() -> None:
    # the child has neither the pool's threads nor the OpenMP team, and waiting for either would hang
    global _pool, _pool_size, _forked
    _pool, _pool_size, _forked = None, 0, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@cache
def _openmp() -> Any:
    """``GOMP_parallel`` of the OpenMP runtime already loaded by torch (GNU, Intel and LLVM have it), or None."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "omp" in line and ".so" in line}
    except OSError:
        return None
    for path in sorted(paths):
        if os.path.basename(path).startswith(("libgomp", "libiomp5", "libomp")):
            try:
                function = ctypes.CDLL(path).GOMP_parallel
            except (OSError, AttributeError):
                continue
            function.argtypes = (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            function.restype = None
            return function
    return None


def split(n: int, parts: int | None = None) -> list[tuple[int, int]]:
    """``n`` items as contiguous ranges, one per torch thread (at least one, possibly empty)."""
    parts = max(1, min(parts or torch.get_num_threads(), n))
    bounds = [n * k // parts for k in range(parts + 1)]
    return list(itertools.pairwise(bounds))


def parallel(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run the tasks at once; their results in order. Tasks must not nest. The first error is raised."""
    if len(tasks) == 1:
        return [tasks[0]()]
    results: list[Any] = [None] * len(tasks)
    errors: list[BaseException] = []
    turn = itertools.count()

    def work(_: Any = None) -> None:
        for k in turn:
            if k >= len(tasks):
                return
            try:
                results[k] = tasks[k]()
            except BaseException as error:  # must not cross the C frame of the OpenMP runtime
                errors.append(error)

    team = None if _forked else _openmp()
    if team is not None:
        team(_Body(work), None, len(tasks), 0)
    else:
        _run_on_pool(work, len(tasks))
    if errors:
        raise errors[0]
    return results


def _run_on_pool(work: Callable[[], None], size: int) -> None:
    global _pool, _pool_size
    if _pool is None or _pool_size < size - 1:
        _pool, _pool_size = ThreadPoolExecutor(size - 1, thread_name_prefix="snn-sparse"), size - 1
    futures = [_pool.submit(work) for _ in range(size - 1)]
    work()
    for future in futures:
        future.result()
