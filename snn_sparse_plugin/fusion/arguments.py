"""What one argument of a node's function was at each call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor

if TYPE_CHECKING:
    from .nodes import Node
    from .recorded import Value

Entry = tuple[Any, ...]
"""One tensor argument of one call: a recorded value (node, call, slot), or a tensor and its version at that time."""


class ArgumentSeries:
    """A sequence of entries; successive values of one result, which most are, are kept as a range.

    ``source``, ``slot``: whose results ``start`` to ``stop`` these are; None: they are in ``entries``.
    """

    __slots__ = ("entries", "slot", "source", "start", "stop")

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries: list[Entry] = []
        self.source: Node | None = None
        self.start = self.stop = self.slot = 0
        for entry in entries:
            self.append(entry)

    @classmethod
    def of_range(cls, source: Node, start: int, stop: int, slot: int) -> ArgumentSeries:
        """Successive values of one result."""
        argument = cls()
        argument.source, argument.start, argument.stop, argument.slot = source, start, stop, slot
        return argument

    def append(self, entry: Entry) -> None:
        if self.source is not None:
            if len(entry) == 3:
                source, call, slot = entry
                if source is self.source and call == self.stop and slot == self.slot:
                    self.stop = call + 1
                    return
            self.entries, self.source = list(self), None
        elif not self.entries and len(entry) == 3:
            self.source, self.start, self.slot = entry
            self.stop = self.start + 1
            return
        self.entries.append(entry)

    def precedes(self, value: Value) -> bool:
        """Whether a value is the next one of the result that the last entry is of."""
        source, call, slot = value
        if self.source is not None:
            return source is self.source and call == self.stop and slot == self.slot
        last = self.entries[-1] if self.entries else ()
        return len(last) == 3 and last[0] is source and last[1] + 1 == call and last[2] == slot

    def fill(self, n: int) -> None:
        """Repeat the last entry, noted once for all calls, up to ``n``."""
        if len(self) < n:
            self.entries += self.entries[-1:] * (n - len(self))

    def replace(self, x: Tensor, other: Tensor) -> None:
        """Have ``other`` wherever ``x`` was."""
        if any(entry[0] is x for entry in self.entries):
            self.entries = [(other, *entry[1:]) if entry[0] is x else entry for entry in self.entries]

    def clear(self) -> None:
        self.entries, self.source = [], None

    def range(self) -> Value | None:
        """The first value, if all are successive values of one result."""
        return None if self.source is None else (self.source, self.start, self.slot)

    def read(self) -> list[Entry]:
        """The entries, of a range the first."""
        return self.entries if self.source is None else [(self.source, self.start, self.slot)]

    def size(self) -> int:
        """Bytes of its tensors that are not parts of others; one that is there at every step counts once."""
        if self.source is not None:
            return 0
        held = {id(x): x for x, *rest in self.entries if len(rest) == 1 and x._base is None}
        return sum(x.numel() * x.element_size() for x in held.values())

    def __len__(self) -> int:
        return len(self.entries) if self.source is None else self.stop - self.start

    def __iter__(self) -> Iterator[Entry]:
        if self.source is None:
            return iter(self.entries)
        source, slot = self.source, self.slot
        return ((source, call, slot) for call in range(self.start, self.stop))

    @overload
    def __getitem__(self, at: int) -> Entry: ...
    @overload
    def __getitem__(self, at: slice) -> ArgumentSeries: ...
    def __getitem__(self, at: int | slice) -> Entry | ArgumentSeries:
        if self.source is None:
            return ArgumentSeries(self.entries[at]) if isinstance(at, slice) else self.entries[at]
        calls = range(self.start, self.stop)[at]
        if isinstance(calls, int):
            return self.source, calls, self.slot
        if calls.step != 1 or not calls:
            return ArgumentSeries((self.source, call, self.slot) for call in calls)
        return ArgumentSeries.of_range(self.source, calls.start, calls.stop, self.slot)


class Slices(ArgumentSeries):
    """Successive slices of one tensor at equal distances in its memory, which want no gradient.

    They are noted by the first and their number: no slice is kept, and a few reads tell whether another one is next.
    """

    __slots__ = ("base", "distance", "dtype", "first", "n", "next", "shape", "strides", "version")

    def __init__(self, first: Tensor, base: Tensor, distance: int, n: int) -> None:
        super().__init__()
        self.first, self.base, self.distance, self.n = first, base, distance, n
        self.shape, self.strides, self.dtype = first.shape, first.stride(), first.dtype
        self.next, self.version = first.storage_offset() + n * distance, base._version

    @classmethod
    def of(cls, argument: ArgumentSeries) -> Slices | None:
        """The tensors of an argument, if that is what they are."""
        if isinstance(argument, Slices):
            return argument
        if len(argument) < 2 or any(len(entry) == 3 for entry in argument):
            return None
        first, base = argument[0][0], argument[0][0]._base
        if base is None or base.is_inference() or first.requires_grad:
            return None
        distance = argument[1][0].storage_offset() - first.storage_offset()
        found = cls(first, base, distance, 1)
        versions = {version for _, version in argument.entries}
        if (
            distance <= 0
            or versions != {found.version}
            or not all(found.take(x) for x, _ in argument.entries[1:])
        ):
            return None
        return found

    def take(self, x: Tensor) -> bool:
        """Append a tensor if it is the next slice: whether it is."""
        if (
            x._base is not self.base
            or x.storage_offset() != self.next
            or x.shape != self.shape
            or x.stride() != self.strides
            or x.dtype is not self.dtype
            or x.requires_grad
            or x._version != self.version
        ):
            return False
        self.n += 1
        self.next += self.distance
        return True

    def whole(self, n: int | None = None) -> Tensor:
        """(n, ...): a view of the slices, or of the first ``n`` that would follow each other."""
        start, shape = self.first.storage_offset(), (self.n if n is None else n, *self.shape)
        base = self.base.detach() if self.base.requires_grad else self.base
        return base.as_strided(shape, (self.distance, *self.strides), start)

    def capacity(self) -> int:
        """How many slices there could be in the tensor's memory."""
        size = self.base.untyped_storage().nbytes() // self.base.element_size()
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return max(self.n, (size - self.first.storage_offset() - last - 1) // self.distance + 1)

    def contiguous(self) -> bool:
        """Whether they and all between them are one stretch of memory."""
        return self.distance == self.shape.numel() and self.first.is_contiguous()

    def size(self) -> int:
        return 0

    def append(self, entry: Entry) -> None:
        raise TypeError("slices are taken, anything else goes into a ArgumentSeries of them")

    def clear(self) -> None:
        del self.first, self.base

    def read(self) -> list[Entry]:
        return [(self.first, self.version)]

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Entry]:
        return iter([(x, self.version) for x in self.whole().unbind(0)])

    @overload
    def __getitem__(self, at: int) -> Entry: ...
    @overload
    def __getitem__(self, at: slice) -> ArgumentSeries: ...
    def __getitem__(self, at: int | slice) -> Entry | ArgumentSeries:
        if isinstance(at, slice):
            return ArgumentSeries((x, self.version) for x in self.whole()[at].unbind(0))
        return self.first if at == 0 else self.whole()[at], self.version
