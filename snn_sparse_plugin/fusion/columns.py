"""What one argument of a lane's function was at each call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from .record import Lane
    from .recorded import Value

Entry = tuple[Any, ...]
"""One tensor argument of one call: a recorded value (lane, call, slot), or a tensor and its version at that time."""


class Column:
    """A sequence of entries; successive values of one result, which most are, are kept as a range.

    ``source``, ``slot``: whose results ``start`` to ``stop`` these are; None: they are in ``entries``.
    """

    __slots__ = ("entries", "slot", "source", "start", "stop")

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries: list[Entry] = []
        self.source: Lane | None = None
        self.start = self.stop = self.slot = 0
        for entry in entries:
            self.append(entry)

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

    def add(self, value: Value) -> bool:
        """Append the value if it is the next one of the range: whether it is."""
        source, call, slot = value
        if source is not self.source or call != self.stop or slot != self.slot:
            return False
        self.stop = call + 1
        return True

    def fill(self, n: int) -> None:
        """Repeat the last entry, noted once for all calls, up to ``n``."""
        if len(self) < n:
            self.entries += self.entries[-1:] * (n - len(self))

    def clear(self) -> None:
        self.entries, self.source = [], None

    def range(self) -> Value | None:
        """The first value, if all are successive values of one result."""
        return None if self.source is None else (self.source, self.start, self.slot)

    def read(self) -> list[Entry]:
        """The entries, of a range the first."""
        return self.entries if self.source is None else [(self.source, self.start, self.slot)]

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
    def __getitem__(self, at: slice) -> Column: ...
    def __getitem__(self, at: int | slice) -> Entry | Column:
        if self.source is None:
            return Column(self.entries[at]) if isinstance(at, slice) else self.entries[at]
        calls = range(self.start, self.stop)[at]
        if isinstance(calls, int):
            return self.source, calls, self.slot
        return Column((self.source, call, self.slot) for call in calls)
