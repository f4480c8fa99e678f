"""The events of an input's first steps, looked for on another thread while its later steps are still to come.

Recording a step loop is Python, which holds the GIL: the other thread gets it once, while this one scans the first
steps without it, and then stays in a kernel that follows the steps as they are announced.
"""

from __future__ import annotations

import os
import threading
from array import array
from functools import cache
from math import prod
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from .bits import LANES
from .events import Found, place_rows, scan_rows
from .jit import kernel
from .memory import array as numbers
from .memory import pinned
from .threads import aside

LARGEST = 1 << 22
"""Events after which the rest is left to the conversion itself, whose memory grows with what it finds."""

_PATIENCE = 1 << 20
"""How often to look for another step: for about half a millisecond."""

_SOON = 4000
"""How often to look whether the other thread is done, before this one sleeps."""

_FEW = 4
"""Steps that are left in the end which the other thread looks at by itself; more are shared."""

_ANNOUNCED, _STOP, _DONE, _FIRST, _EVENTS, _BINARY, _ORDERED = range(7)


def _pointer(context: Any, builder: Any, array_type: Any, args: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, args[0]).data, [args[1]])


@intrinsic
def _read(typingctx: Any, words: Any, at: Any) -> Any:
    """A word that another thread may write at any time."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(context, builder, signature.args[0], args), "acquire", 8)

    return types.int64(words, types.intp), codegen


@intrinsic
def _write(typingctx: Any, words: Any, at: Any, value: Any) -> Any:
    """Write a word after everything that was written before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args)
        builder.store_atomic(args[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.none(words, types.intp, types.int64), codegen


@kernel()
def _follow(x, mine, B, counts, first, columns, indptr, indices, words):  # type: ignore[no-untyped-def]
    """Scan rows from ``mine`` on as far as they are announced, a step of ``B`` rows at a time, until told to stop.

    Where that is because all steps have come, their events and the ``first`` ones are put in order.
    """
    r, n, binary, idle, stop, full = mine, 0, True, 0, 0, False
    while idle < _PATIENCE and not full:
        stop = _read(words, _STOP)
        waiting = _read(words, _ANNOUNCED) - r
        if stop < 0 or (stop > 0 and (waiting == 0 or waiting > _FEW * B)):
            break
        if waiting == 0:
            idle += 1
            continue
        idle = 0
        at, n, ones = scan_rows(x, r, r + B, 1, 1, counts, columns, n)
        binary &= ones
        full = at < r + B
        r = at
    words[_EVENTS] = n
    words[_BINARY] = 1 if binary else 0
    if stop > 0 and r == stop * B and words[_FIRST] + n <= indices.shape[0]:
        k = 0
        for b in range(B):
            for t in range(stop):
                indptr[b * stop + t] = k
                k += counts[t * B + b]
        indptr[r] = k
        place_rows(0, mine, stop, B, first, 0, indptr, indices)
        place_rows(mine, r, stop, B, columns, 0, indptr, indices)
        words[_ORDERED] = stop
    _write(words, _DONE, r)


@cache
def _compile(dtype: np.dtype) -> None:
    """Compile the kernel by a call that ends at once, on the calling thread: the other one would do it while this one
    may be compiling kernels that share parts with it."""
    integers = np.zeros(1, dtype=np.int32)
    words = np.frombuffer(array("q", [0, -1, *[0] * 5]), dtype=np.int64)
    _follow(
        *(np.zeros((1, 1), dtype), 0, 1, integers),
        *(integers, integers, integers, integers, words),
    )


def _place(x: np.ndarray) -> int:
    """Where its numbers are; ``x.ctypes`` makes an object for that, which takes ten times as long."""
    return x.__array_interface__["data"][0]  # type: ignore[no-any-return]


class Ahead:
    """Looks for the events of successive slices of a tensor.

    Args:
        x: (T, B, N...), contiguous float CPU memory, of which the first ``known`` steps are there; more are said by
            :meth:`announce`. T is the most that there can be.
        densest: share of nonzeros above which the search ends, as nobody will want the events.
    """

    def __init__(self, x: Tensor, known: int, densest: float) -> None:
        B = x.shape[1]
        self._rows = pinned(x.detach().reshape(len(x) * B, -1))
        self._B, self._process = B, os.getpid()
        self._counts = np.empty(len(self._rows), dtype=np.int32)
        self._words = array("q", [known * B, *[0] * 6])
        self._claimed, self._ended = threading.Lock(), threading.Lock()
        self._ended.acquire()
        self._mine = known * B // 2
        self._densest = densest
        self._parts: list[Found] | None = None  # in the end
        out = self._out = self._room(self._mine)
        _compile(self._rows.dtype)
        aside(self._work)
        at, n, binary = scan_rows(self._rows, 0, self._mine, 1, 1, self._counts, out, 0)
        self._first = Found(0, at, out[:n], binary)
        self._words[_FIRST] = n
        if at < self._mine:
            self.drop()

    def announce(self, steps: int) -> None:
        """So many steps are there now."""
        self._words[_ANNOUNCED] = steps * self._B

    def finish(self, steps: int) -> None:
        """So many steps are all: their events will be wanted."""
        if not self._words[_STOP]:
            self.announce(steps)
            self._words[_STOP] = steps

    def drop(self) -> None:
        """No more steps are wanted."""
        self._words[_STOP] = -1

    def end(self, rows: np.ndarray, counts: np.ndarray) -> list[Found]:
        found, last = self._found(rows), 0
        if found:
            last = found[-1].last
            counts[:last] = self._counts[:last]
        return found

    def has_found_few(self, x: Tensor) -> bool:
        T, B, *features = x.shape
        found = self.ordered(numbers(x, (T * B, prod(features))), T)
        return found is not None and found[1].size <= self._densest * x.numel()

    def ordered(self, rows: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray, bool] | None:
        found = self._found(rows)
        if not found or self._words[_ORDERED] != T or found[-1].last != len(rows):
            return None
        total = self._words[_FIRST] + self._words[_EVENTS]
        return self._indptr[: len(rows) + 1], self._indices[:total], all(part.binary for part in found)

    def _found(self, rows: np.ndarray) -> list[Found]:
        if not self._words[_STOP]:
            self.drop()
        if self._parts is None:
            self._parts = [self._first, *self._followed()]
        known, last = self._rows, self._parts[-1].last
        same = _place(rows) == _place(known) and rows.shape[1:] == known.shape[1:]
        return list(self._parts) if same and rows.dtype == known.dtype and last <= len(rows) else []

    def _work(self) -> None:
        if not self._claimed.acquire(blocking=False):
            return
        try:
            rows = self._rows
            self._columns, self._indices = self._room(len(rows)), self._room(len(rows))
            self._indptr = np.empty(len(rows) + 1, dtype=np.int32)
            _follow(
                *(rows, self._mine, self._B, self._counts, self._out, self._columns),
                *(self._indptr, self._indices, np.frombuffer(self._words, dtype=np.int64)),
            )
        finally:
            self._ended.release()

    def _room(self, rows: int) -> np.ndarray:
        M = self._rows.shape[1]
        return np.empty(min(int(self._densest * rows * M) + M + LANES, LARGEST), dtype=np.int32)

    def _followed(self) -> list[Found]:
        """What the other thread found."""
        if self._first.last < self._mine or os.getpid() != self._process:  # a fork has no other thread
            return []
        if self._claimed.acquire(blocking=False):  # it has not begun, and will not
            return []
        for _ in range(_SOON):
            if self._words[_DONE]:
                break
        else:
            self._ended.acquire()
        last, n = self._words[_DONE], self._words[_EVENTS]
        # nothing where it failed
        return (
            [Found(self._mine, last, self._columns[:n], self._words[_BINARY] == 1)]
            if last > self._mine
            else []
        )
