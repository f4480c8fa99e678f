"""The events of an input's first steps, looked for on another thread while its later steps are still to come.

Recording a step loop is Python, which holds the GIL: the other thread gets it once, while this one scans the first
steps without it, and then stays in a kernel that follows the steps as they are announced.
"""

from __future__ import annotations

import os
import threading
from array import array
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from .bits import LANES
from .events import Found, scan_rows
from .jit import kernel
from .threads import aside

LARGEST = 1 << 22
"""Events after which the rest is left to the conversion itself, whose memory grows with what it finds."""

_PATIENCE = 1 << 20
"""How often to look for another step: for about half a millisecond."""

_SOON = 1000
"""How often to look whether the step that is being scanned is done, before this thread sleeps."""

_ANNOUNCED, _STOP, _DONE, _EVENTS, _BINARY = range(5)


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
def _follow(x, first, B, counts, out, words):  # type: ignore[no-untyped-def]
    """Scan rows from ``first`` on as far as they are announced, a step of ``B`` rows at a time, until told to stop."""
    r, n, binary, idle = first, 0, True, 0
    while idle < _PATIENCE and _read(words, _STOP) == 0:
        if r >= _read(words, _ANNOUNCED):
            idle += 1
            continue
        idle = 0
        at, n, ones = scan_rows(x, r, r + B, counts, out, n)
        binary &= ones
        stuck = at < r + B
        r = at
        if stuck:
            break
    words[_EVENTS] = n
    words[_BINARY] = 1 if binary else 0
    _write(words, _DONE, r)


class Ahead:
    """Looks for the events of successive slices of a tensor.

    Args:
        x: (T, B, N...), contiguous float CPU memory, of which the first ``known`` steps are there; more are said by
            :meth:`announce`. T is the most that there can be.
        densest: share of nonzeros above which the search ends, as nobody will want the events.
    """

    def __init__(self, x: Tensor, known: int, densest: float) -> None:
        B = x.shape[1]
        # keeps the memory, and torch resizes none that numpy looks at
        self._rows = x.detach().reshape(len(x) * B, -1).numpy()
        self._B, self._process = B, os.getpid()
        self._counts = np.empty(len(self._rows), dtype=np.int64)
        self._words = array("q", [known * B, 0, 0, 0, 0])
        self._claimed, self._ended = threading.Lock(), threading.Lock()
        self._ended.acquire()
        self._mine = known * B // 2
        self._densest = densest
        self._found: list[Found] | None = None  # in the end
        aside(self._work)
        out = self._room(self._mine, densest)
        at, n, binary = scan_rows(self._rows, 0, self._mine, self._counts, out, 0)
        self._first = Found(0, at, out[:n], binary)
        if at < self._mine:
            self.drop()

    def announce(self, steps: int) -> None:
        """So many steps are there now."""
        self._words[_ANNOUNCED] = steps * self._B

    def drop(self) -> None:
        """No more steps are wanted."""
        self._words[_STOP] = 1

    def end(self, rows: np.ndarray, counts: np.ndarray) -> list[Found]:
        self.drop()
        if self._found is None:
            self._found = [self._first, *self._followed()]
        last, known = self._found[-1].last, self._rows
        same = rows.ctypes.data == known.ctypes.data and rows.shape[1:] == known.shape[1:]
        if not same or rows.dtype != known.dtype or last > len(rows):
            return []
        counts[:last] = self._counts[:last]
        return list(self._found)

    def _work(self) -> None:
        if not self._claimed.acquire(blocking=False):
            return
        try:
            self._out = self._room(len(self._rows), self._densest)
            words = np.frombuffer(self._words, dtype=np.int64)
            _follow(self._rows, self._mine, self._B, self._counts, self._out, words)
        finally:
            self._ended.release()

    def _room(self, rows: int, densest: float) -> np.ndarray:
        M = self._rows.shape[1]
        return np.empty(min(int(densest * rows * M) + M + LANES, LARGEST), dtype=np.int32)

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
            [Found(self._mine, last, self._out[:n], self._words[_BINARY] == 1)] if last > self._mine else []
        )
