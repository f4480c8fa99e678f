"""The heaps in which HDF5 keeps rows of different lengths, looked at before the HDF5 library, which never comes back
from some damaged ones."""

from __future__ import annotations

import mmap
from typing import IO

_HEAD, _MARK = 16, b"GCOL\x01"


def check_heaps(file: IO[bytes]) -> None:
    """Raise ValueError where a heap has an object without an end: the library would look for it for ever.

    A heap is ``GCOL``, its size at byte 8, and from byte 16 on objects of a head of 16 bytes, number (2) and size (8 at
    byte 8), and data in steps of 8 bytes; number 0 is free space and its size has the head in it (HDF5 file format,
    III.E).
    """
    file.seek(0, 2)
    if not file.tell():
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begin = data.find(_MARK)
        while begin >= 0:
            end = begin + _integer(data, begin + 8, 8)
            _check_heap(data, begin, end)
            begin = data.find(_MARK, begin + 1)


def _check_heap(data: mmap.mmap, begin: int, end: int) -> None:
    at = begin + _HEAD
    while at + _HEAD <= min(end, len(data)):
        number, size = _integer(data, at, 2), _integer(data, at + 8, 8)
        if size >= 1 << 62 or not (number or size):
            raise ValueError(f"an object of the heap at byte {begin} has no end")
        at += size if number == 0 else _HEAD + (size + 7) // 8 * 8


def _integer(data: mmap.mmap, at: int, length: int) -> int:
    return int.from_bytes(data[at : at + length], "little")
