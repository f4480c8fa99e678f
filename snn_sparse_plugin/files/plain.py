"""Files of ``torch.save`` that hold tensors and plain data only, read without trust in what they declare."""

from __future__ import annotations

import io
import pickle
import zipfile
from os import PathLike
from typing import Any

import torch

from . import reading

_BYTES = {
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage", "UntypedStorage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}


def load_plain(path: str | PathLike[str], what: str, advice: str = "") -> Any:
    """Tensors and plain data, on the CPU; no code in the file is run.

    Raises:
        InputError: there is no such file, or it is not ``what``.
    """
    with reading(path, what, advice):
        with zipfile.ZipFile(path) as archive:
            _check_storages(archive)
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_storages(archive: zipfile.ZipFile) -> None:
    """Raise ValueError where storages are not as large as the file says: torch 2.6 reads beyond their end."""
    sizes = {info.filename: info.file_size for info in archive.infolist()}
    packed = [info.filename for info in archive.infolist() if info.compress_type]
    if packed:  # torch never compresses, so what a file holds is never larger than the file
        raise ValueError(f"{packed[0]} in it is compressed")
    (pickled,) = (name for name in sizes if name.endswith("/data.pkl"))
    storages = _Storages(archive.read(pickled))
    storages.load()
    for kind, key, numel in storages.found:
        if sizes[f"{pickled.removesuffix('data.pkl')}data/{key}"] != numel * _BYTES[kind]:
            raise ValueError(f"storage {key} declares {numel} numbers of {kind}, and holds another number")


class _Storages(pickle._Unpickler):  # the one in Python: C's lets a file of a few bytes take any memory
    """Runs over a pickle, makes nothing of what it refers to, and collects the storages."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.found: list[tuple[str, str, int]] = []

    def find_class(self, module: str, name: str) -> Any:
        return _Nothing(name)

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, numel = pid
        self.found.append((kind.name, key, numel))
        return None


class _Nothing(dict):
    """In place of whatever a pickle names: can be called, filled and given a state."""

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name = name

    def __call__(self, *_: Any) -> _Nothing:
        return _Nothing()

    def __setstate__(self, state: Any) -> None:
        pass

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)
