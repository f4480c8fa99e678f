"""Recordings in the layout of the Spiking Heidelberg Digits: HDF5 files of spike times and units."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, InputError, MissingDependencyError
from ..spikes import SpikeTrain


class SpikeFile:
    """The recordings of one file, plain or gzipped: ``spikes/times`` (s), ``spikes/units`` and ``labels``.

    Args:
        path: the HDF5 file.
        channels: number of units; a larger unit raises.
        limit: at most so many recordings; 0 is all.

    Raises:
        ConfigError: there is no such file.
        InputError: it has another layout.
        MissingDependencyError: h5py is not installed.
    """

    def __init__(self, path: str | Path, channels: int = 700, limit: int = 0) -> None:
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"no file {path}: give the path of an HDF5 file in the layout of SHD.")
        self.path, self.channels = path, channels
        with _opened(path) as file:
            try:
                times, units = file["spikes/times"], file["spikes/units"]
                labels = np.asarray(file["labels"][: limit or None], dtype=np.int64)
            except KeyError as error:
                raise InputError(f"{path} is not in the layout of SHD: {error.args[0]}") from error
            stop = len(labels)
            self._times = [np.asarray(x, dtype=np.float32) for x in times[:stop]]
            self._units = [np.asarray(x, dtype=np.int64) for x in units[:stop]]
        largest = max((int(x.max(initial=0)) for x in self._units), default=0)
        if largest >= channels:
            raise InputError(f"{path} has unit {largest}, expected {channels} channels.")
        self.labels = torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int] | Tensor, dt: float, T: int) -> tuple[SpikeTrain, Tensor]:
        """Some recordings as spikes in bins of ``dt`` seconds, (T, B, channels), and their labels, (B,).

        A bin holds one spike of a unit at most; what comes after the last bin is left out.
        """
        chosen = [int(i) for i in indices]
        counts = [len(self._times[i]) for i in chosen]
        sample = np.repeat(np.arange(len(chosen)), counts)
        bins = (np.concatenate([self._times[i] for i in chosen]) / np.float32(dt)).astype(np.int64)
        units = np.concatenate([self._units[i] for i in chosen])
        keep = bins < T
        places = np.unique((sample[keep] * T + bins[keep]) * self.channels + units[keep])
        rows, columns = np.divmod(places, self.channels)
        indptr = np.zeros(len(chosen) * T + 1, dtype=np.int64)
        indptr[1:] = np.cumsum(np.bincount(rows, minlength=len(chosen) * T))
        train = SpikeTrain(
            torch.from_numpy(indptr.astype(np.int32)),
            torch.from_numpy(columns.astype(np.int32)),
            (T, len(chosen), self.channels),
        )
        return train, self.labels[chosen]


def _opened(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError("h5py is not installed: pip install snn-sparse-plugin[data]") from error
    try:
        return h5py.File(gzip.open(path) if path.suffix == ".gz" else path, "r")
    except OSError as error:
        raise InputError(f"{path} is not an HDF5 file: {error}") from error
