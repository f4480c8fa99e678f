"""Values that hold inside a block, for the thread or asyncio task that entered it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

V = TypeVar("V")


class Scoped(Generic[V]):
    """The value of the innermost block that has not ended; blocks may end in any order.

    The token of a ContextVar brings back what was there when its block began. Of two generators that each hold a block
    open and end in the order they began, the second would bring the first's value back for good.
    """

    def __init__(self, name: str) -> None:
        self._open: ContextVar[tuple[list[V], ...]] = ContextVar(name, default=())

    def get(self) -> V | None:
        """The value in force, None outside all blocks."""
        blocks = self._open.get()
        return blocks[-1][0] if blocks else None

    def all(self) -> tuple[V, ...]:
        """The values of all open blocks, the innermost last."""
        return tuple(block[0] for block in self._open.get())

    @contextmanager
    def block(self, value: V) -> Iterator[V]:
        """Put ``value`` in force inside the block."""
        mine = [value]  # told from others by identity
        self._open.set((*self._open.get(), mine))
        try:
            yield value
        finally:
            self._open.set(tuple(block for block in self._open.get() if block is not mine))
