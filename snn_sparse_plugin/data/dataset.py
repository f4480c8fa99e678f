"""Samples as spike events: one CSR of a whole set, from which a batch is gathered."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..core.errors import ConfigError, InputError
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

    Raises:
        InputError: events that do not fit together, or lie outside the features.

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
        self, columns: Tensor, ends: Tensor, labels: Tensor, features: int, *, check: bool = True
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

    @classmethod
    def from_spikes(cls, train: SpikeTrain, labels: Tensor) -> SpikeDataset:
        """The samples of a train of ones, (T, samples, N...), and their labels."""
        if train.values is not None:
            raise InputError("a SpikeDataset holds spikes of 1; this train is graded.")
        indptr = train.indptr.cpu().long()
        ends = indptr[1:].view(train.B, train.T) - indptr[:-1].view(train.B, train.T)[:, :1]
        columns = _narrow(train.indices.cpu().numpy(), train.features)
        return cls(torch.from_numpy(columns), ends.int(), labels, train.features, check=False)

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
        return SpikeDataset(columns, self.ends[places], self.labels[places], self.features, check=False)

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

    def add(self, sample: np.ndarray, step: np.ndarray, column: np.ndarray, samples: int) -> None:
        """Events of the next ``samples`` samples, in any order, by number of the sample (from 0), step and feature.

        A step holds one spike of a feature at most; what comes after the last step is left out.
        """
        keep = step < self.T
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
        return SpikeDataset(
            torch.from_numpy(columns),
            torch.from_numpy(ends),
            torch.as_tensor(labels),
            self.features,
            check=False,
        )


def collate(samples: Sequence[tuple[SpikeTrain, Any]]) -> tuple[SpikeTrain, Tensor]:
    """Samples ``(SpikeTrain, label)`` as one batch: the ``collate_fn`` for a DataLoader over data of your own.

    Trains are joined along B and have the same T and features; none carries a gradient. Labels are numbers or
    tensors of one shape, and keep their dtype.

    Example:
        >>> one = SpikeTrain.from_dense(torch.ones(4, 1, 2))
        >>> x, y = collate([(one, 3), (one, 5)])
        >>> x.shape, y.tolist()
        (torch.Size([4, 2, 2]), [3, 5])
    """
    trains = [train for train, _ in samples]
    if not trains:
        raise InputError("collate needs at least one sample.")
    shapes = {(train.T, *train.shape[2:]) for train in trains}
    if len(shapes) > 1:
        raise InputError(f"samples of one batch have the same steps and features, got {sorted(shapes)}.")
    if any(train.requires_grad for train in trains):
        raise InputError("samples of a batch carry no gradient: detach() them.")
    offset, indptrs = 0, [trains[0].indptr[:1]]
    for train in trains:
        indptrs.append(train.indptr[1:] + offset)
        offset += train.events
        if offset > MAX_EVENTS:
            raise InputError(f"more than {MAX_EVENTS} events in one batch; make it smaller.")
    values = None
    if any(train.values is not None for train in trains):
        values = torch.cat(
            [t.indices.new_ones(t.events, dtype=t.dtype) if t.values is None else t.values for t in trains]
        )
    joined = SpikeTrain(
        torch.cat(indptrs),
        torch.cat([train.indices for train in trains]),
        (trains[0].T, sum(train.B for train in trains), *trains[0].shape[2:]),
        values,
        dtype=trains[0].dtype,
        check=False,
    )
    return joined, torch.stack([torch.as_tensor(label) for _, label in samples])


class _Batches(Sampler):
    """Lists of indices. The order of an epoch is drawn with its first batch, from ``generator`` and nothing else."""

    def __init__(
        self, samples: int, batch_size: int, shuffle: bool, generator: torch.Generator | None, drop_last: bool
    ) -> None:
        self.samples, self.batch_size = samples, batch_size
        self.shuffle, self.generator, self.drop_last = shuffle, generator, drop_last

    def __len__(self) -> int:
        whole, rest = divmod(self.samples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Tensor]:
        order = (
            torch.randperm(self.samples, generator=self.generator)
            if self.shuffle
            else torch.arange(self.samples)
        )
        # yield, so that nothing is drawn before the first batch: with workers torch makes two iterators and uses one
        yield from order.split(self.batch_size)[: len(self)]


def _as_it_is(batch: Any) -> Any:
    return batch


def loader(
    dataset: SpikeDataset,
    batch_size: int,
    *,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
    drop_last: bool = False,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterable[tuple[SpikeTrain, Tensor]]:
    """Batches of a set, an epoch each time it is iterated over: torch's DataLoader over whole batches.

    Args:
        batch_size: B.
        shuffle: a new order in every epoch.
        generator: where the order comes from; its state when an epoch begins decides the whole epoch, whatever
            ``num_workers`` is. None is torch's global generator.
        drop_last: leave out a last batch of fewer samples.
        num_workers: processes that gather batches. Gathering takes well below a millisecond, so 0 is nearly
            always the fastest.
        pin_memory: batches in page-locked memory, for ``x.to("cuda", non_blocking=True)``.

    Returns:
        A DataLoader, with ``len()`` batches of (SpikeTrain (T, B, N), labels (B,)).

    Raises:
        ConfigError: ``batch_size`` below 1.

    Example:
        >>> from snn_sparse_plugin.data import load_spikes
        >>> batches = loader(load_spikes("digits").train, 256, shuffle=True)
        >>> [len(y) for x, y in batches]
        [256, 256, 256, 256, 256, 157]
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=_Batches(len(dataset), batch_size, shuffle, generator, drop_last),
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # of the workers' seeds: the global one stays untouched
    )
