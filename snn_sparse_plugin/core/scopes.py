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
        self.blocks: ContextVar[tuple[list[V], ...]] = ContextVar(name, default=())
        """The open blocks, the innermost last, each with its value for its only item."""

    def get(self) -> V | None:
        """The value in force, None outside all blocks."""
        blocks = self.blocks.get()
        return blocks[-1][0] if blocks else None

    def all(self) -> tuple[V, ...]:
        """The values of all open blocks, the innermost last."""
        return tuple(block[0] for block in self.blocks.get())

    @contextmanager
    def block(self, value: V) -> Iterator[V]:
        """Put ``value`` in force inside the block."""
        mine = [value]  # told from others by identity
        self.blocks.set((*self.blocks.get(), mine))
        try:
            yield value
        finally:
            self.blocks.set(tuple(block for block in self.blocks.get() if block is not mine))
