"""Values that hold inside a block, for the thread or asyncio task that entered it."""

from __future__ import annotations

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

    def block(self, value: V) -> Block[V]:
        """Put ``value`` in force inside the block."""
        return Block(self.blocks, value)


class Block(Generic[V]):
    """A block of one :class:`Scoped`. A class, as entering a generator takes twice as long."""

    __slots__ = ("blocks", "mine")

    def __init__(self, blocks: ContextVar[tuple[list[V], ...]], value: V) -> None:
        self.blocks, self.mine = blocks, [value]  # told from others by identity

    def __enter__(self) -> V:
        self.blocks.set((*self.blocks.get(), self.mine))
        return self.mine[0]

    def __exit__(self, *_: object) -> None:
        blocks = self.blocks.get()
        if blocks and blocks[-1] is self.mine:
            self.blocks.set(blocks[:-1])
        else:
            self.blocks.set(tuple(block for block in blocks if block is not self.mine))
