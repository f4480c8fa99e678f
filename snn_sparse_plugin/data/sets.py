"""``load_spikes``: a data set by name, ready to train on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..core.errors import ConfigError, InputError
from . import images, recordings, spike_files
from .coding import latency
from .dataset import EventStore, SpikeDataset, check_dt
from .official import check_files, download_set, how_to_fetch

_LATENCY_TAU = 20e-3  # seconds, of the latency code [Perez-Nieves & Goodman 2021]


@dataclass(frozen=True)
class SpikeData:
    """A set of samples of ``T`` steps of ``dt`` seconds; ``valid`` is None where a set has no such part."""

    name: str
    train: SpikeDataset
    test: SpikeDataset
    T: int
    features: int
    classes: int
    dt: float
    valid: SpikeDataset | None = None


class _Request(NamedTuple):
    """What was asked of :func:`load_spikes`, with defaults filled in."""

    name: str
    root: Path
    T: int
    dt: float
    classes: int
    limit: int | None
    merge_polarity: bool


class _Set(NamedTuple):
    """A row of the table: published steps and dt, number of classes, and who reads it."""

    T: int
    dt: float
    classes: int
    read: Callable[[_Request], dict[str, SpikeDataset]]
    merge_polarity: bool = True


def load_spikes(
    name: str,
    root: str | Path | None = None,
    *,
    steps: int | None = None,
    dt: float | None = None,
    limit: int | None = None,
    merge_polarity: bool | None = None,
    verify: bool = False,
    download: bool = False,
) -> SpikeData:
    """A data set as spikes, by name; ``docs/data.md`` lists the files each one is read from.

    ``"digits"``, ``"mnist"`` and ``"fashion-mnist"`` are images in the latency code :func:`latency_spikes`, its
    time constant 20 ms; ``"shd"`` and ``"ssc"`` recordings of 700 channels; ``"n-mnist"`` and ``"dvs-gesture"``
    those of event cameras of 34×34 and 128×128 pixels. A step of a recording holds one spike of a feature at
    most, and what comes after the last step is left out. All samples are encoded once and kept as events.

    Args:
        root: folder of the files; only the digits need none.
        steps: T; None is the published number (100 for images, 300 for event cameras, 500 for SHD and SSC).
        dt: seconds per step; None is the published value (1 ms, for SHD and SSC 2 ms, for DVS Gesture 5 ms).
        limit: at most so many training samples, spread evenly over the file, and of the others as large a share;
            None keeps all.
        merge_polarity: event cameras: one feature per pixel (34×34), or one per polarity and pixel (2×34×34).
            None merges for N-MNIST, as published, and keeps polarities apart for DVS Gesture.
        verify: compare the files with their official checksums, and warn where they differ or there is none to
            compare.
        download: fetch missing files into ``root``, through tonic or torchvision. Else nothing touches the network.

    Raises:
        ConfigError: an unknown name, no ``root``, or a number out of range.
        InputError: files that are missing, truncated, or something else, or hold impossible numbers.
        FileError: there is no room to unpack a file.
        MissingDependencyError: scikit-learn (digits), h5py (SHD, SSC), tonic or torchvision (to download) is missing.

    Example:
        >>> data = load_spikes("digits")
        >>> data.train
        SpikeDataset(samples=1437, T=100, features=64, events=38771, density=0.422%)
        >>> x, y = data.train.batch([0, 1, 2])
        >>> x.shape
        torch.Size([100, 3, 64])
    """
    if name not in SETS:
        raise ConfigError(f"no spike data {name!r}; known: {', '.join(SETS)}.")
    if root is None and name != "digits":
        raise ConfigError(
            f"{name} is read from disk: say where with --root DIR (root=...). {how_to_fetch(name)}"
        )
    known = SETS[name]
    if (steps is not None and steps < 1) or (limit is not None and limit < 1):
        raise ConfigError(f"steps and limit must be at least 1; got {steps} and {limit}.")
    if dt is not None:
        check_dt(dt)
    request = _Request(
        name,
        Path(root or ".").expanduser(),
        known.T if steps is None else steps,
        known.dt if dt is None else dt,
        known.classes,
        limit,
        known.merge_polarity if merge_polarity is None else merge_polarity,
    )
    if download:
        download_set(name, request.root)
    if verify and root is not None:
        compared = check_files(name, request.root)
        if not compared:
            warnings.warn(
                f"verify: no file in {request.root} is of {name} in the form in which it is published, so none "
                "could be compared.",
                stacklevel=2,
            )
        for path, official in compared.items():
            if not official:
                warnings.warn(
                    f"{path} is not the official file of {name}: its checksum differs.", stacklevel=2
                )
    parts = known.read(request)
    features = {part.features for part in parts.values()}
    if len(features) > 1:
        raise InputError(f"{request.root}: the parts of {name} differ in features: {sorted(features)}.")
    return SpikeData(
        name=name, T=request.T, features=features.pop(), classes=known.classes, dt=request.dt, **parts
    )


def spread(samples: int, limit: int | None) -> np.ndarray:
    """Indices of ``limit`` of so many samples, evenly spread, so that sorted classes keep their shares.

    Example:
        >>> spread(10, 4).tolist()
        [0, 2, 5, 7]
    """
    if limit is None or limit >= samples:
        return np.arange(samples)
    return np.arange(limit) * samples // limit


class _Choice:
    """Which samples of a part are read. The part asked for first, training, sets the share of all others."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.total = limit, 0

    def __call__(self, samples: int) -> np.ndarray:
        if self.limit is None:
            return np.arange(samples)
        self.total = self.total or max(1, samples)
        return spread(samples, max(1, samples * self.limit // self.total))


def _images(request: _Request) -> dict[str, SpikeDataset]:
    choose = _Choice(request.limit)
    # a level fires always at the same step: 256 logarithms instead of one per pixel
    parts, intensities = images.read_levels(request.name, request.root)
    table = latency(intensities, tau=_LATENCY_TAU / request.dt).clamp(max=request.T).long().numpy()
    found = {}
    for part, (levels, labels) in parts.items():
        chosen = choose(len(labels))
        store = EventStore(request.T, levels.shape[1])
        for some in np.array_split(chosen, max(1, len(chosen) // 2048)):
            step = table[levels[some]]
            sample, pixel = np.nonzero(step < request.T)
            store.add(sample, step[sample, pixel], pixel, len(some))
        found[part] = store.done(labels[chosen])
    return found


def _spike_files(request: _Request) -> dict[str, SpikeDataset]:
    choose = _Choice(request.limit)
    parts = ("train", "valid", "test") if request.name == "ssc" else ("train", "test")
    paths = {part: spike_files.find_file(request.name, part, request.root) for part in parts}
    return {
        part: spike_files.read_spikes(path, request.T, request.dt, classes=request.classes, choose=choose)
        for part, path in paths.items()
    }


def _event_camera(request: _Request) -> dict[str, SpikeDataset]:
    choose = _Choice(request.limit)
    camera = recordings.CAMERAS[request.name]
    sources = {part: recordings.find_source(camera, part, request.root) for part in ("train", "test")}
    return {
        part: recordings.read_source(
            camera,
            source,
            request.T,
            request.dt,
            merge_polarity=request.merge_polarity,
            chosen=choose(len(source.names)),
        )
        for part, source in sources.items()
    }


SETS: dict[str, _Set] = {
    "digits": _Set(100, 1e-3, 10, _images),
    "mnist": _Set(100, 1e-3, 10, _images),
    "fashion-mnist": _Set(100, 1e-3, 10, _images),
    "shd": _Set(500, 2e-3, 20, _spike_files),
    "ssc": _Set(500, 2e-3, 35, _spike_files),
    "n-mnist": _Set(300, 1e-3, 10, _event_camera),
    "dvs-gesture": _Set(300, 5e-3, 11, _event_camera, merge_polarity=False),
}
