"""Arrays and packed files of other people, read with a bound: a small file cannot fill memory or disk."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Callable, Iterable
from os import PathLike, fspath
from typing import IO, Any

import numpy as np

_FREE = 1 << 28  # bytes that any file may unpack to
_RATIO = (
    64  # and so many times its own size: recordings and images pack two to ten times, tables of zeros more
)


def bound(packed: int) -> int:
    """The most bytes that a file of ``packed`` bytes may unpack to."""
    return _FREE + _RATIO * packed


def check_bound(unpacked: int, packed: int) -> None:
    """Raise ValueError where ``packed`` bytes unpack to more than real data would."""
    if unpacked > bound(packed):
        raise ValueError(
            f"{packed} bytes would unpack to {unpacked} or more, expected {bound(packed)} at most"
        )


def read_bounded(file: IO[bytes], packed: int, at_most: int | None = None) -> bytes:
    """All of an unpacking stream, or its first ``at_most`` bytes, within the bound of its packed size."""
    data = bytearray()
    left = bound(packed) + 1 if at_most is None else at_most
    while left and (block := file.read(min(1 << 20, left))):
        data += block
        left -= len(block)
        check_bound(len(data), packed)
    return bytes(data)


def array(data: bytes) -> np.ndarray:
    """The array in the bytes of an ``.npy`` file, read-only; nothing is unpickled.

    The header's shape and dtype are compared with the bytes that are there before anything is made.

    Raises:
        ValueError: something else.

    Example:
        >>> file = io.BytesIO()
        >>> np.save(file, np.arange(3))
        >>> array(file.getvalue()).tolist()
        [0, 1, 2]
    """
    file = io.BytesIO(data)
    readers: dict[Any, Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"its format is of version {version}")
    try:
        shape, by_columns, dtype = readers[version](file)
    except Exception as error:  # a parser of Python's own literals reads the header
        raise ValueError(f"its header is damaged: {error}") from error
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not loaded")
    if any(n < 0 for n in shape) or not dtype.itemsize:
        raise ValueError(f"it declares {dtype} {shape}")
    expected, there = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if expected != there:
        raise ValueError(f"it declares {dtype} {shape}, {expected} bytes, and holds {there}")
    if not expected:
        return np.empty(shape, dtype)
    flat = np.frombuffer(data, dtype, offset=file.tell())
    return flat.reshape(shape, order="F" if by_columns else "C")


def arrays(
    path: str | PathLike[str], wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, np.ndarray]:
    """The wanted arrays of an ``.npz`` file by name, read-only.

    Raises ValueError, or what zipfile raises for a damaged archive.
    """
    with zipfile.ZipFile(fspath(path)) as archive:
        stems = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        chosen = [stem for stem in stems if wanted(stem)]
        check_members(archive, [f"{stem}.npy" for stem in chosen])
        return {stem: array(archive.read(f"{stem}.npy")) for stem in chosen}


def check_members(archive: zipfile.ZipFile, names: Iterable[str]) -> None:
    """Raise ValueError where files of an archive declare more bytes than real data would unpack to."""
    infos = [archive.getinfo(name) for name in names]
    check_bound(sum(info.file_size for info in infos), os.path.getsize(str(archive.filename)))
