"""Run nogil kernels on several threads: safe under autograd's threads, after fork, and on a busy machine.

The calling thread takes tasks itself until none is left, and then waits only for tasks that another thread has
begun: where the cores are busy it does all the work rather than wait for a thread to be scheduled. numba's own
parallel layers cannot serve here: workqueue aborts when two threads enter it, OpenMP hangs after a fork, and its
barriers made a step ten times slower as soon as one other process was running.

After each of torch's parallel operations its OpenMP threads spin for milliseconds, on the cores that our threads
need. So they are sent home first, which costs 0.05 ms: on two cores a training step takes 6.3 instead of 8.9 ms.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
V = TypeVar("V")

WAKING = 80e-6
"""Seconds until another thread has begun, and until the one that waits goes on; measured on two virtual cores."""

_jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
_workers = 0
_lock = threading.Lock()
_forked = False


def _after_fork() -> None:
    # the child has none of the threads, and asking OpenMP to end those it remembers would hang
    global _jobs, _workers, _lock, _forked
    _jobs, _workers, _lock, _forked = queue.SimpleQueue(), 0, threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def split(n: int, parts: int | None = None, ahead: int = 0) -> list[tuple[int, int]]:
    """``n`` items as contiguous ranges, one per torch thread (at least one, possibly empty).

    The first, which the calling thread takes, has ``ahead`` more of them than each of the others, of which none begins
    before it is awake: what it can do in :data:`WAKING`.
    """
    parts = max(1, min(parts or torch.get_num_threads(), n))
    if parts == 1:
        return [(0, n)]
    ahead = min(ahead, n - parts)
    bounds = [0, *(ahead + (n - ahead) * k // parts for k in range(1, parts + 1))]
    return list(itertools.pairwise(bounds))


def parallel(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run the tasks at once; their results in order. The first error is raised when all have ended."""
    if len(tasks) == 1:
        return [tasks[0]()]
    results: list[Any] = [None] * len(tasks)
    errors: list[BaseException] = []
    turn, ended = itertools.count(), itertools.count(1)
    done = threading.Lock()
    done.acquire()

    def work() -> None:
        for k in turn:
            if k >= len(tasks):
                return
            try:
                results[k] = tasks[k]()
            except BaseException as error:
                errors.append(error)
            if next(ended) == len(tasks):
                done.release()

    _prepare(len(tasks) - 1)
    for _ in range(len(tasks) - 1):
        _jobs.put(work)
    work()
    done.acquire()
    if errors:
        raise errors[0]
    return results


def in_stages(
    ranges: Sequence[R],
    stages: Sequence[Callable[[R, Any], T]],
    finish: Callable[[int, list[T], Any], V],
) -> list[V]:
    """Send each range through all stages, each of which takes what the one before gave: -> of each stage what
    ``finish`` makes of its number, of what it gave for all ranges, and of what was made of the stage before.

    That is done on the way, by a thread that is ahead, while others are still at the next stage.
    """
    given: list[list[Any]] = [[None] * len(ranges) for _ in stages]
    results: list[Any] = [None] * len(stages)
    ended = [itertools.count(1) for _ in stages]
    whole, made = [False] * len(stages), [False] * len(stages)
    claims = [threading.Lock() for _ in stages]
    inference = torch.is_inference_mode_enabled()  # of this thread

    def finish_before(k: int) -> None:
        for j in range(k):
            if whole[j] and (not j or made[j - 1]) and claims[j].acquire(blocking=False):
                task = partial(finish, j, given[j], results[j - 1] if j else None)
                results[j] = _in_mode(inference, task)
                made[j] = True

    def work(at: int) -> None:
        found = None
        for k, stage in enumerate(stages):
            given[k][at] = found = stage(ranges[at], found)
            if next(ended[k]) == len(ranges):
                whole[k] = True
            finish_before(k)

    parallel([partial(work, at) for at in range(len(ranges))])
    finish_before(len(stages))
    return results


def _in_mode(inference: bool, task: Callable[[], V]) -> V:
    """Of a worker thread, whose modes are its own."""
    if torch.is_inference_mode_enabled() == inference:
        return task()
    with torch.inference_mode(inference):
        return task()


def aside(task: Callable[[], None]) -> None:
    """Hand a task to another thread and go on; whether it began, ended or failed is for the task to tell."""

    def work() -> None:
        with suppress(Exception):
            task()

    _prepare(1)
    _jobs.put(work)


def _prepare(workers: int) -> None:
    end_spinning = _openmp_pause()
    if end_spinning is not None and not _forked:
        end_spinning(_PAUSE_SOFT)
    _ensure_workers(workers)


_PAUSE_SOFT = 1  # omp_pause_soft: threads end, settings stay; the next parallel operation starts them again


@cache
def _openmp_pause() -> Any:
    """``omp_pause_resource_all`` (OpenMP 5.0) of the runtime that torch has loaded, or None."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "omp" in line and ".so" in line}
    except OSError:
        return None
    beside_torch = os.path.dirname(torch.__file__)  # other packages bring runtimes of their own
    for path in sorted(paths, key=lambda path: (not path.startswith(beside_torch), path)):
        if os.path.basename(path).startswith(("libgomp", "libiomp5", "libomp")):
            try:
                function = ctypes.PyDLL(path).omp_pause_resource_all
            except (OSError, AttributeError):
                continue
            function.argtypes, function.restype = (ctypes.c_int,), ctypes.c_int
            return function
    return None


def _ensure_workers(wanted: int) -> None:
    global _workers
    if _workers >= wanted:
        return
    with _lock:
        while _workers < wanted:
            threading.Thread(target=_serve, args=(_jobs,), name="snn-sparse", daemon=True).start()
            _workers += 1


def _serve(jobs: queue.SimpleQueue[Callable[[], None]]) -> None:
    while True:
        jobs.get()()
