"""Samples as spike events: one CSR of a whole set, from which a batch is gathered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..core.errors import ConfigError, InputError
from ..core.lengths import read_lengths
from ..core.spikes import MAX_EVENTS, SpikeTrain, check_csr


class SpikeDataset(Dataset):
    """Samples of T steps and N features, stored as the events of all of them.

    Two bytes per event (four where there are more than 65536 features) and four per sample and step. Made by
    :func:`load_spikes`, :meth:`from_spikes` and :func:`from_tonic`.

    Args:
        columns: feature of every event, sample by sample, rising within a step.
        ends: int32 (samples, T), number of events of the sample up to the end of each step.
        labels: int64 (samples,).
        features: N.
        check: look at every event; False trusts the caller, and wrong ones are then out-of-bounds accesses.
        lengths: how many of the T steps a sample has, (samples,) whole numbers; None is up to its last event.

    Raises:
        InputError: events that do not fit together, lie outside the features or after the end of their sample.

    Example:
        >>> train = SpikeTrain.from_dense((torch.rand(20, 5, 7) < 0.1).float())
        >>> data = SpikeDataset.from_spikes(train, torch.tensor([0, 1, 2, 1, 0]))
        >>> data  # doctest: +ELLIPSIS
        SpikeDataset(samples=5, T=20, features=7, events=..., density=...%)
        >>> x, y = data.batch([3, 0])
        >>> x.shape, y.tolist()
        (torch.Size([20, 2, 7]), [1, 0])
    """

    def __init__(
        self,
        columns: Tensor,
        ends: Tensor,
        labels: Tensor,
        features: int,
        *,
        check: bool = True,
        lengths: Tensor | None = None,
    ) -> None:
        if ends.dim() != 2 or len(ends) != len(labels):
            raise InputError(f"ends {tuple(ends.shape)} must have a row for each of {len(labels)} labels.")
        sizes = ends[:, -1].long() if ends.shape[1] else torch.zeros(len(ends), dtype=torch.long)
        if int(sizes.sum()) != len(columns):
            raise InputError(f"ends promise {int(sizes.sum())} events, there are {len(columns)}.")
        self.columns, self.ends, self.labels, self.features = columns, ends, labels.long(), features
        self.starts = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        if check:
            rows = (self.starts[:-1, None] + ends).reshape(-1)
            check_csr(torch.cat([self.starts[:1], rows]), columns.int(), features)
        self._lengths = None if lengths is None else read_lengths(lengths, self.T, len(self))
        if self._lengths is not None and bool((self._lengths < self._active()).any()):
            sample = int((self._lengths < self._active()).nonzero()[0])
            raise InputError(f"sample {sample} has events after its {int(self._lengths[sample])} steps.")

    @classmethod
    def from_spikes(cls, train: SpikeTrain, labels: Tensor, lengths: Any = None) -> SpikeDataset:
        """The samples of a train of ones, (T, samples, N...), their labels and, if they differ, numbers of steps."""
        if train.values is not None:
            raise InputError("a SpikeDataset holds spikes of 1; this train is graded.")
        indptr = train.indptr.cpu().long()
        ends = indptr[1:].view(train.B, train.T) - indptr[:-1].view(train.B, train.T)[:, :1]
        columns = _narrow(train.indices.cpu().numpy(), train.features)
        stored = torch.from_numpy(columns)
        return cls(stored, ends.int(), labels, train.features, check=False, lengths=lengths)

    @property
    def lengths(self) -> Tensor:
        """Steps that each sample has, int64 (samples,): as given, else up to and with the last that holds an event.

        Example:
            >>> train = SpikeTrain.from_dense(torch.eye(4).unsqueeze(2))  # sample b spikes at step b alone
            >>> SpikeDataset.from_spikes(train, torch.arange(4)).lengths.tolist()
            [1, 2, 3, 4]
        """
        return self._active() if self._lengths is None else self._lengths

    def _active(self) -> Tensor:
        if not self.T:
            return torch.zeros(len(self), dtype=torch.int64)
        return (self.ends < self.ends[:, -1:]).sum(1) + (self.ends[:, -1] > 0)

    @property
    def T(self) -> int:
        """Steps of every sample."""
        return self.ends.shape[1]

    @property
    def density(self) -> float:
        """Spikes per feature, step and sample."""
        return len(self.columns) / max(1, self.ends.numel() * self.features)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(samples={len(self)}, T={self.T}, features={self.features}, "
            f"events={len(self.columns)}, density={100 * self.density:.3g}%)"
        )

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[SpikeTrain, Tensor]:
        """Some samples as a SpikeTrain (T, B, N) of float32 and their labels, int64 (B,), in the given order.

        Raises:
            IndexError: indices that are not whole numbers (a mask, for one), or outside the set.
        """
        chosen = self._chosen(indices)
        starts = self.starts.numpy()
        first, last = starts[chosen], starts[chosen + 1]
        offsets = np.zeros(len(chosen) + 1, np.int64)
        np.cumsum(last - first, out=offsets[1:])
        if offsets[-1] > MAX_EVENTS:
            raise InputError(f"{offsets[-1]} events in a batch of {len(chosen)}: a train holds {MAX_EVENTS}.")
        indptr = np.zeros(len(chosen) * self.T + 1, np.int32)
        np.add(
            self.ends.numpy()[chosen],
            offsets[:-1, None],
            out=indptr[1:].reshape(-1, self.T),
            casting="unsafe",
        )
        events = np.empty(offsets[-1], np.int32)
        columns = self.columns.numpy()
        for at, begin, end in zip(offsets.tolist(), first.tolist(), last.tolist(), strict=False):
            events[at : at + end - begin] = columns[begin:end]
        train = SpikeTrain(
            torch.from_numpy(indptr),
            torch.from_numpy(events),
            (self.T, len(chosen), self.features),
            check=False,  # rows of a checked set
        )
        return train, self.labels[torch.from_numpy(chosen)]

    def subset(self, indices: Sequence[int] | Tensor) -> SpikeDataset:
        """A set of some of the samples, in the given order, such as a part to validate on; copies their events.

        Raises:
            IndexError: as :meth:`batch`.

        Example:
            >>> train = SpikeTrain.from_dense((torch.rand(20, 5, 7) < 0.1).float())
            >>> data = SpikeDataset.from_spikes(train, torch.arange(5))
            >>> order = torch.randperm(5)
            >>> len(data.subset(order[:4])), len(data.subset(order[4:]))
            (4, 1)
        """
        chosen = self._chosen(indices)
        places = torch.from_numpy(chosen)
        ranges = zip(self.starts[places].tolist(), self.starts[places + 1].tolist(), strict=True)
        parts = [self.columns[begin:end] for begin, end in ranges]
        columns = torch.cat(parts) if parts else self.columns[:0]
        lengths = None if self._lengths is None else self._lengths[places]
        ends, labels = self.ends[places], self.labels[places]
        return SpikeDataset(columns, ends, labels, self.features, check=False, lengths=lengths)

    def _chosen(self, indices: Sequence[int] | Tensor) -> np.ndarray:
        """Numbers of samples from 0 on, int64."""
        given = np.asarray(indices)
        if given.size and given.dtype.kind not in "iu":
            raise IndexError(
                f"samples are chosen by their numbers, got {given.dtype}; of a mask take mask.nonzero()."
            )
        chosen = given.astype(np.int64).reshape(-1)
        if len(chosen) and not (-len(self) <= chosen.min() and chosen.max() < len(self)):
            raise IndexError(f"sample {chosen.min()}…{chosen.max()} of a set of {len(self)}.")
        return chosen % max(1, len(self))

    def __getitem__(self, index: int | Sequence[int] | Tensor) -> tuple[SpikeTrain, Tensor]:
        """Sample ``index`` as a batch of one, or :meth:`batch` of several."""
        if isinstance(index, (int, np.integer)):
            x, y = self.batch([int(index)])
            return x, y[0]
        return self.batch(index)


def _narrow(columns: np.ndarray, features: int) -> np.ndarray:
    return columns.astype(np.uint16 if features <= 1 << 16 else np.int32)


def check_dt(dt: float) -> None:
    """Raise :class:`ConfigError` unless ``dt`` is a length of a step in seconds."""
    if not 0 < dt < math.inf:
        raise ConfigError(f"dt is the length of a step in seconds, finite and > 0; got {dt}.")


class EventStore:
    """Collects the events of recordings, some at a time, into a :class:`SpikeDataset` of T steps."""

    def __init__(self, T: int, features: int) -> None:
        if T < 1 or features < 1:
            raise ConfigError(f"T and features must be at least 1, got {T} and {features}.")
        self.T, self.features = T, features
        self._columns: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []
        self._late: list[np.ndarray] = []  # who goes on after the last step

    def add(self, sample: np.ndarray, step: np.ndarray, column: np.ndarray, samples: int) -> None:
        """Events of the next ``samples`` samples, in any order, by number of the sample (from 0), step and feature.

        A step holds one spike of a feature at most; what comes after the last step is left out.
        """
        keep = step < self.T
        late = np.zeros(samples, np.bool_)
        late[sample[~keep]] = True
        self._late.append(late)
        places = sample[keep].astype(np.int64)
        places *= self.T
        places += step[keep]
        places *= self.features
        places += column[keep]
        places.sort()
        if len(places):
            places = places[np.r_[True, places[1:] != places[:-1]]]
        rows, columns = np.divmod(places, self.features)
        counts = np.bincount(rows, minlength=samples * self.T).reshape(samples, self.T)
        self._ends.append(np.cumsum(counts, axis=1, dtype=np.int32))
        self._columns.append(_narrow(columns, self.features))

    def done(self, labels: np.ndarray | Tensor) -> SpikeDataset:
        """The set, with a label for each sample."""
        columns = np.concatenate(self._columns) if self._columns else np.empty(0, np.uint16)
        ends = np.concatenate(self._ends) if self._ends else np.empty((0, self.T), np.int32)
        late = torch.from_numpy(np.concatenate([*self._late, np.empty(0, np.bool_)]))
        data = SpikeDataset(
            torch.from_numpy(columns),
            torch.from_numpy(ends),
            torch.as_tensor(labels),
            self.features,
            check=False,
        )
        if bool(late.any()):
            data._lengths = torch.where(late, self.T, data.lengths)
        return data
