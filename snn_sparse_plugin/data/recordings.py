"""Recordings of event cameras: N-MNIST and DVS Gesture from folders or zip files, and any data set of tonic."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from ..core.errors import InputError
from ..files import printable, reading, unpack
from .dataset import EventStore, SpikeDataset, check_dt
from .events import microseconds, whole
from .official import FOLDERS, how_to_fetch

_CHUNK = 4_000_000  # events that are sorted together


class Events(NamedTuple):
    """Events of one recording: time in µs, pixel and polarity (0 or 1), (events,); as they are stored, not checked."""

    t: np.ndarray
    x: np.ndarray
    y: np.ndarray
    p: np.ndarray


@dataclass(frozen=True)
class Source:
    """Where the recordings of one part lie: their names, in a fixed order, and how one is read."""

    path: Path
    names: list[str]
    read: Callable[[str], bytes]


@dataclass(frozen=True)
class Camera:
    """A data set of recordings, one file each.

    Args:
        pixels: width = height.
        suffix: of a recording's file.
        places: per part, names of the folder or zip file.
        label: class of a recording, from its path.
        decode: its events; raises ValueError or InputError for a file that is none.
    """

    name: str
    pixels: int
    classes: int
    suffix: str
    places: dict[str, tuple[str, ...]]
    label: Callable[[PurePosixPath], int]
    decode: Callable[[bytes], Events]


def decode_nmnist(data: bytes) -> Events:
    """Five bytes an event: x, y, polarity (one bit) and time in µs (23 bits) [Orchard et al. 2015].

    An event at y = 240 is none, but says that the clock has run over: 2¹³ µs more from there on.

    Example:
        >>> events = decode_nmnist(bytes([3, 5, 0x80, 0x01, 0x02]))
        >>> [int(part[0]) for part in events]
        [258, 3, 5, 1]
    """
    if not data or len(data) % 5:
        raise ValueError(f"{len(data)} bytes are not a number of events of 5 bytes")
    raw = np.frombuffer(data, np.uint8).reshape(-1, 5)
    x, y = raw[:, 0], raw[:, 1]
    high = raw[:, 2].astype(np.int64)
    t = ((high & 127) << 16) | (raw[:, 3].astype(np.int64) << 8) | raw[:, 4]
    overflow = y == 240
    if overflow.any():
        t += np.cumsum(overflow) << 13
        real = ~overflow
        return Events(t[real], x[real], y[real], high[real] >> 7)
    return Events(t, x, y, high >> 7)


def decode_npy(data: bytes) -> Events:
    """Tonic's form of DVS Gesture: an array (events, 4) of x, y, polarity and time in ms."""
    events = unpack.array(data)
    if events.ndim != 2 or events.shape[1] != 4 or events.dtype.kind not in "iuf":
        raise ValueError(f"an array {events.dtype} {events.shape} is not one of numbers (events, 4)")
    x, y, p, t = events.T
    return Events(microseconds(t, 1000, "the recording"), x, y, p)


CAMERAS = {
    "n-mnist": Camera(
        "n-mnist",
        34,
        10,
        ".bin",
        {"train": ("Train", "Train.zip", "train.zip"), "test": ("Test", "Test.zip", "test.zip")},
        lambda path: int(path.parent.name),
        decode_nmnist,
    ),
    "dvs-gesture": Camera(
        "dvs-gesture",
        128,
        11,
        ".npy",
        {
            "train": ("ibmGestureTrain", "ibmGestureTrain.zip"),
            "test": ("ibmGestureTest", "ibmGestureTest.zip"),
        },
        lambda path: int(path.stem),
        decode_npy,
    ),
}


def find_source(camera: Camera, part: str, root: Path) -> Source:
    """The folder or zip file of a part, in ``root`` or in tonic's folder below it."""
    if not root.is_dir():
        raise InputError(
            f"{root} is not a folder; --root names the folder of the files of {camera.name}. "
            f"{how_to_fetch(camera.name)}"
        )
    places = [base / place for base in (root, root / FOLDERS[camera.name]) for place in camera.places[part]]
    for place in places:
        source = None
        if place.is_dir():
            source = _folder(place, camera.suffix)
        elif place.is_file():
            source = _archive(place, camera.suffix)
        if source is not None and source.names:
            return source
    raise InputError(
        f"no {camera.name} recordings (*{camera.suffix}) for the {part} part in {root}: expected one of "
        f"{', '.join(str(place.relative_to(root)) for place in places)}. {how_to_fetch(camera.name)}"
    )


def _folder(place: Path, suffix: str) -> Source:
    names = sorted(path.relative_to(place).as_posix() for path in place.rglob(f"*{suffix}"))
    return Source(place, names, lambda name: (place / name).read_bytes())


def _archive(place: Path, suffix: str) -> Source:
    with reading(place, "a complete zip file", "Fetch it again."):
        archive = zipfile.ZipFile(place)
        names = sorted(name for name in archive.namelist() if name.endswith(suffix))
        unpack.check_members(archive, names)
    return Source(place, names, archive.read)


def read_source(
    camera: Camera, source: Source, T: int, dt: float, *, merge_polarity: bool, chosen: np.ndarray
) -> SpikeDataset:
    """The chosen recordings of a part as samples of T steps of ``dt`` seconds."""
    names = [source.names[k] for k in chosen]
    labels = np.array([_label(camera, source, name) for name in names], dtype=np.int64)

    def recordings() -> Iterator[tuple[str, Events]]:
        for name in _tracked(names, f"{camera.name} from {source.path.name}"):
            yield name, _decoded(camera, source, name)

    size = (camera.pixels, camera.pixels, 2)
    return _encode(recordings(), size, T, dt, merge_polarity, str(source.path)).done(labels)


def _label(camera: Camera, source: Source, name: str) -> int:
    try:
        label = camera.label(PurePosixPath(source.path.name) / name)
    except ValueError:
        label = -1
    if not 0 <= label < camera.classes:
        raise InputError(
            f"{source.path}: the path of {printable(name)} does not name a class 0 to {camera.classes - 1} of "
            f"{camera.name}."
        )
    return label


def _decoded(camera: Camera, source: Source, name: str) -> Events:
    who = f"{source.path}: {printable(name)}"
    try:
        with reading(who, f"a recording of {camera.name}"):
            return camera.decode(source.read(name))
    except InputError as error:
        if who in str(error):
            raise
        raise InputError(f"{who}: {error}") from error


def _encode(
    recordings: Iterable[tuple[str, Events]],
    size: tuple[int, int, int],
    T: int,
    dt: float,
    merge_polarity: bool,
    where: str,
) -> EventStore:
    """All recordings in order; ``size`` is width, height and number of polarities."""
    check_dt(dt)
    width, height, polarities = size
    store = EventStore(T, width * height * (1 if merge_polarity else polarities))
    steps: list[np.ndarray] = []
    columns: list[np.ndarray] = []

    def flush() -> None:
        sample = np.repeat(np.arange(len(steps)), [len(step) for step in steps])
        store.add(sample, np.concatenate(steps), np.concatenate(columns), len(steps))
        steps.clear()
        columns.clear()

    held = 0
    for name, (t, x, y, p) in recordings:
        who = f"{where}: {printable(name)}"
        if not len(t) == len(x) == len(y) == len(p):
            raise InputError(f"{who} has {len(t)} times, {len(x)} x, {len(y)} y and {len(p)} polarities.")
        x, y = whole(x, width, f"{who} has x"), whole(y, height, f"{who} has y")
        p = whole(p, polarities, f"{who} has polarity")
        plane = 0 if merge_polarity else p.astype(np.int64) * height
        columns.append((plane + y.astype(np.int64)) * width + x)
        steps.append(_step(microseconds(t, 1, who), dt, T))
        held += len(t)
        if held > _CHUNK:
            flush()
            held = 0
    if steps:
        flush()
    return store


def _step(t: np.ndarray, dt: float, T: int) -> np.ndarray:
    """Steps of times in µs, in whole numbers where ``dt`` is a whole number of µs; T is all that is later."""
    length = dt * 1e6
    if 1 <= length < 2**53 and abs(length - round(length)) < 1e-6:
        return np.minimum(t // round(length), T)
    with np.errstate(over="ignore"):  # what is infinite is late too
        return np.minimum(t / length, T).astype(np.int64)


def _tracked(items: Sequence[Any], what: str) -> Iterable[Any]:
    """A progress bar on a terminal, for more than a few recordings."""
    if len(items) < 500 or not sys.stderr.isatty():
        return items
    return track(items, what, console=Console(stderr=True), transient=True)


def _whole_label(label: Any, who: str) -> int:
    try:
        number = int(label)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number != label or not -(2**63) <= number < 2**63:
        raise InputError(f"{who}: a label is a whole number, got {label!r}.")
    return number


def from_tonic(
    dataset: Any,
    steps: int,
    dt: float,
    *,
    sensor_size: tuple[int, int, int] | None = None,
    merge_polarity: bool = False,
) -> SpikeDataset:
    """Any data set of `tonic <https://tonic.readthedocs.io>`_ that yields events, as samples of events.

    Args:
        dataset: yields pairs of a structured array with fields ``t`` (µs), ``x`` and, if it has them, ``y`` and ``p``,
            and an integer label. Transforms that keep events events may be set.
        steps: T.
        dt: seconds per step.
        sensor_size: width, height and number of polarities; None is ``dataset.sensor_size``.
        merge_polarity: one feature per pixel, instead of one per polarity and pixel.

    Returns:
        A set of N = polarities × height × width features, in this order. Recordings of different durations have
        different ``lengths``: up to the last event, and all ``steps`` where events come after them.

    Raises:
        ConfigError: steps or dt that are not positive.
        InputError: samples that are no events, or events outside the sensor or before time 0.

    Example:
        >>> events = np.array([(0, 1, 0, 1)], dtype=[("t", int), ("x", int), ("y", int), ("p", int)])
        >>> from_tonic([(events, 2)], steps=10, dt=1e-3, sensor_size=(4, 3, 2)).batch([0])[0].to_dense().nonzero()
        tensor([[ 0,  0, 13]])
    """
    size = dataset.sensor_size if sensor_size is None else sensor_size
    labels = []

    def recordings() -> Iterator[tuple[str, Events]]:
        for k in _tracked(range(len(dataset)), f"{type(dataset).__name__}"):
            events, label = dataset[k]
            names = getattr(getattr(events, "dtype", None), "names", None) or ()
            if not {"t", "x"} <= set(names):
                raise InputError(
                    f"sample {k}: expected a structured array with fields t and x, got fields {names or 'none'}; "
                    "leave out transforms that make frames."
                )
            labels.append(_whole_label(label, f"sample {k}"))
            zeros = np.zeros(len(events), np.int64)
            yield (
                f"sample {k}",
                Events(
                    events["t"],
                    events["x"],
                    events["y"] if "y" in names else zeros,
                    events["p"] if "p" in names and size[2] > 1 else zeros,
                ),
            )

    store = _encode(recordings(), tuple(size), steps, dt, merge_polarity, type(dataset).__name__)
    return store.done(np.array(labels, dtype=np.int64))
