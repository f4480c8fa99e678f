"""Recordings in the layout of the Spiking Heidelberg Digits: HDF5 files of spike times and units."""

from __future__ import annotations

import gzip
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError, FileError, InputError, MissingDependencyError
from ..core.spikes import SpikeTrain
from ..files import reading, unpack
from .dataset import EventStore, SpikeDataset, check_dt
from .events import whole
from .heaps import check_heaps
from .official import FOLDERS, how_to_fetch

CHANNELS = 700
_CHUNK = 512  # recordings read together
_LATEST = 2.0**63 / 1e6  # seconds


class SpikeFile:
    """The recordings of one file, plain or packed: ``spikes/times`` (s), ``spikes/units`` and ``labels``.

    They keep their times, so that :meth:`batch` can bin them anew each time; :func:`load_spikes` bins once.

    Args:
        path: the HDF5 file, plain, gzipped, or alone in a zip file.
        channels: number of units; a larger unit raises.
        limit: at most so many recordings; 0 is all.

    Raises:
        ConfigError: there is no such file.
        InputError: it has another layout, it is truncated, or a time, unit or label is impossible.
        FileError: there is no room to unpack it.
        MissingDependencyError: h5py is not installed.
    """

    def __init__(self, path: str | Path, channels: int = CHANNELS, limit: int = 0) -> None:
        path = Path(path).expanduser()
        if not path.is_file():
            raise ConfigError(f"no file {path}: give the path of an HDF5 file in the layout of SHD.")
        self.path, self.channels = path, channels
        self._times: list[np.ndarray] = []
        self._units: list[np.ndarray] = []
        with _opened(path) as file:
            labels = _labels(path, file)[: limit or None]
            for times, units in _recordings(path, file, np.arange(len(labels)), channels):
                self._times += times
                self._units += units
        self.labels = torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int] | Tensor, dt: float, T: int) -> tuple[SpikeTrain, Tensor]:
        """Some recordings as spikes in bins of ``dt`` seconds, (T, B, channels), and their labels, (B,).

        A bin holds one spike of a unit at most; what comes after the last bin is left out.
        """
        check_dt(dt)
        chosen = [int(i) for i in indices]
        store = EventStore(T, self.channels)
        if chosen:
            _add(store, [self._times[i] for i in chosen], [self._units[i] for i in chosen], dt)
        return store.done(self.labels[chosen]).batch(range(len(chosen)))


def read_spikes(
    path: Path,
    T: int,
    dt: float,
    *,
    channels: int = CHANNELS,
    classes: int | None = None,
    choose: Callable[[int], np.ndarray] = np.arange,
) -> SpikeDataset:
    """The recordings of a file as samples of T steps of ``dt`` seconds.

    Args:
        classes: labels at or above it raise.
        choose: from the number of recordings, the indices of those to read, rising.
    """
    store = EventStore(T, channels)
    with _opened(path) as file:
        labels = _labels(path, file)
        chosen = choose(len(labels))
        labels = labels[chosen]
        if classes is not None and len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            found = f"{labels.min()}…{labels.max()}"
            raise InputError(
                f"{path}: labels {found}, expected classes 0 to {classes - 1}; is it another set?"
            )
        for times, units in _recordings(path, file, chosen, channels):
            _add(store, times, units, dt)
    return store.done(labels)


def find_file(name: str, part: str, root: Path) -> Path:
    """The file of a part of ``"shd"`` or ``"ssc"``, in ``root`` or in tonic's folder below it."""
    if not root.is_dir():
        raise InputError(
            f"{root} is not a folder; --root names the folder of the files of {name}. {how_to_fetch(name)}"
        )
    folders = (root, root / FOLDERS[name])
    for folder in folders:
        for ending in (".h5", ".h5.gz", ".h5.zip"):
            path = folder / f"{name}_{part}{ending}"
            if path.is_file():
                return path
    raise InputError(
        f"no {name} recordings for the {part} part in {root}: expected {name}_{part}.h5[.gz|.zip] there or in "
        f"{folders[1]}. {how_to_fetch(name)}"
    )


def _labels(path: Path, file: Any) -> np.ndarray:
    with reading(path, "in the layout of SHD"):
        parts = {key: file[key] for key in ("labels", "spikes/times", "spikes/units")}
        sizes = {key: len(part) for key, part in parts.items()}
        if len(set(sizes.values())) > 1:
            raise InputError(f"{path} is not in the layout of SHD: its parts differ in length, {sizes}.")
        for part in parts.values():  # a data set can declare any size, and be made of what is not in the file
            unpack.check_bound(part.size * part.dtype.itemsize, path.stat().st_size)
        return whole(np.asarray(parts["labels"][:]), 1 << 31, f"{path} has labels").astype(np.int64)


def _recordings(
    path: Path, file: Any, chosen: np.ndarray, channels: int
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Times (s) and units of the chosen recordings, some at a time."""
    for begin in range(0, len(chosen), _CHUNK):
        part = chosen[begin : begin + _CHUNK]
        # a slice where it can be one: h5py picks single rows slowly
        which = slice(part[0], part[-1] + 1) if part[-1] - part[0] == len(part) - 1 else part
        with reading(path, "in the layout of SHD"):
            times, units = (
                [np.asarray(row) for row in file[f"spikes/{key}"][which]] for key in ("times", "units")
            )
        yield times, [_checked(path, *each, channels) for each in zip(part, times, units, strict=True)]


def _checked(path: Path, k: int, time: np.ndarray, unit: np.ndarray, channels: int) -> np.ndarray:
    """The units of recording ``k``, where they and its times are what they have to be."""
    if time.ndim != 1 or time.dtype.kind not in "iuf":
        raise InputError(f"{path}: recording {k} has times of {time.dtype} {time.shape}, expected seconds.")
    if unit.shape != time.shape:
        raise InputError(f"{path}: recording {k} has {len(time)} times and {unit.size} units.")
    if not len(time):
        return unit.astype(np.int64)
    if not float(time.min()) >= 0:  # also NaN
        raise InputError(f"{path}: recording {k} has a spike at {time.min()} s, expected times from 0 on.")
    if not float(time.max()) < _LATEST:
        raise InputError(
            f"{path}: recording {k} has a spike at {time.max()} s, later than 64 bits of µs can count."
        )
    if unit.dtype.kind in "iuf" and not (unit.min() >= 0 and unit.max() < channels):
        wrong = unit.max() if not unit.max() < channels else unit.min()
        raise InputError(f"{path} has unit {wrong}, expected {channels} channels.")
    return whole(unit, channels, f"{path}: recording {k} has unit")


def _add(store: EventStore, times: list[np.ndarray], units: list[np.ndarray], dt: float) -> None:
    sample = np.repeat(np.arange(len(times)), [len(time) for time in times])
    seconds = np.concatenate(times).astype(np.float32)
    with np.errstate(over="ignore"):  # what is infinite is late too
        length = max(np.float32(dt), np.finfo(np.float32).tiny)
        step = np.minimum(seconds / length, np.float32(store.T)).astype(np.int64)
    store.add(sample, step, np.concatenate(units), len(times))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open HDF5 file; a packed one is unpacked to disk first, since HDF5 jumps to and fro in it."""
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError("h5py is not installed: pip install h5py") from error
    if path.suffix not in (".gz", ".zip"):
        with reading(path, "an HDF5 file"), path.open("rb") as plain:
            check_heaps(plain)
        with _hdf5(h5py, path, path) as file:
            yield file
        return
    with _temporary(path) as plain:
        with (
            reading(path, f"a complete {path.suffix} file", "Fetch it again."),
            gzip.open(path) if path.suffix == ".gz" else _only_member(path) as packed,
        ):
            _unpack(path, packed, plain)
            check_heaps(plain)
        with _hdf5(h5py, plain, path) as file:
            yield file


def _unpack(path: Path, packed: Any, plain: IO[bytes]) -> None:
    size, done = path.stat().st_size, 0
    while block := packed.read(1 << 20):
        done += len(block)
        unpack.check_bound(done, size)
        try:
            plain.write(block)
            plain.flush()
        except OSError as error:
            raise _no_room(path, error) from error


def _temporary(path: Path) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise _no_room(path, error) from error


def _no_room(path: Path, error: OSError) -> FileError:
    where = tempfile.tempdir or "a folder for temporary files"
    return FileError(
        f"{path} cannot be unpacked into {where} ({error.strerror or error}): make room there, name another folder in "
        "TMPDIR, or unpack the file yourself."
    )


@contextmanager
def _hdf5(h5py: Any, file: Any, path: Path) -> Iterator[Any]:
    with reading(path, "an HDF5 file"):
        found = h5py.File(file, "r")
    with found:
        yield found


@contextmanager
def _only_member(path: Path) -> Iterator[Any]:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".h5")]
        if len(names) != 1:
            raise InputError(f"{path} holds {len(names)} .h5 files, expected one.")
        unpack.check_members(archive, names)
        with archive.open(names[0]) as member:
            yield member
