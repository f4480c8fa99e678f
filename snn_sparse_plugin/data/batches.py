"""Batches of samples: of a set, in an order that can be resumed, and of samples of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..core.errors import ConfigError, InputError
from ..core.spikes import MAX_EVENTS, SpikeTrain
from .dataset import SpikeDataset


@overload
def collate(
    samples: Sequence[tuple[SpikeTrain, Any]], *, lengths: Literal[False] = False
) -> tuple[SpikeTrain, Tensor]: ...


@overload
def collate(
    samples: Sequence[tuple[SpikeTrain, Any]], *, lengths: Literal[True]
) -> tuple[SpikeTrain, Tensor, Tensor]: ...


def collate(samples: Sequence[tuple[SpikeTrain, Any]], *, lengths: bool = False) -> tuple[Any, ...]:
    """Samples ``(SpikeTrain, label)`` as one batch: the ``collate_fn`` for a DataLoader over data of your own.

    Trains are joined along B and have the same T and features; none carries a gradient. Labels are numbers or
    tensors of one shape, and keep their dtype. With ``lengths=True`` (``collate_fn=partial(collate, lengths=True)``)
    trains may differ in T: the batch has the longest, and is ``(x, lengths, y)`` with the T of each, int64 (B,), for
    :func:`~snn_sparse_plugin.unroll`.

    Raises:
        InputError: no samples, different shapes, or trains with a gradient.

    Example:
        >>> one = SpikeTrain.from_dense(torch.ones(4, 1, 2))
        >>> x, y = collate([(one, 3), (one, 5)])
        >>> x.shape, y.tolist()
        (torch.Size([4, 2, 2]), [3, 5])
        >>> x, steps, y = collate([(one, 3), (SpikeTrain.from_dense(torch.ones(9, 1, 2)), 5)], lengths=True)
        >>> x.shape, steps.tolist()
        (torch.Size([9, 2, 2]), [4, 9])
    """
    trains = [train for train, _ in samples]
    if not trains:
        raise InputError("collate needs at least one sample.")
    steps = torch.tensor([train.T for train in trains for _ in range(train.B)])
    if lengths:
        trains = [_longer(train, int(steps.max())) for train in trains]
    shapes = {(train.T, *train.shape[2:]) for train in trains}
    if len(shapes) > 1:
        raise InputError(
            f"samples of one batch have the same steps and features, got {sorted(shapes)}; "
            f"lengths=True takes different steps."
        )
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
    labels = torch.stack([torch.as_tensor(label) for _, label in samples])
    return (joined, steps, labels) if lengths else (joined, labels)


def _longer(train: SpikeTrain, T: int) -> SpikeTrain:
    """The same events in more steps."""
    if train.T == T or train.requires_grad:
        return train
    rows = torch.arange(T, device=train.device).clamp(max=train.T)
    ends = train.indptr[rows + train.T * torch.arange(train.B, device=train.device).unsqueeze(1)]
    indptr = torch.cat([ends.flatten(), train.indptr[-1:]])
    shape = (T, train.B, *train.shape[2:])
    return SpikeTrain(indptr, train.indices, shape, train.values, dtype=train.dtype, check=False)


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


class _WithLengths(Dataset):
    """Batches ``(x, lengths, y)`` of a set."""

    def __init__(self, dataset: SpikeDataset) -> None:
        self.dataset, self.lengths = dataset, dataset.lengths

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: Tensor) -> tuple[SpikeTrain, Tensor, Tensor]:
        x, y = self.dataset.batch(indices)
        return x, self.lengths[indices], y


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
    lengths: bool = False,
) -> Iterable[tuple[Any, ...]]:
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
        lengths: batches of three: how many steps each sample has (:attr:`SpikeDataset.lengths`) between the two.

    Returns:
        A DataLoader, with ``len()`` batches of (SpikeTrain (T, B, N), labels (B,)); with ``lengths`` of (SpikeTrain,
        lengths int64 (B,), labels).

    Raises:
        ConfigError: ``batch_size`` below 1.

    Example:
        >>> from snn_sparse_plugin.data import load_spikes
        >>> batches = loader(load_spikes("digits").train, 256, shuffle=True)
        >>> [len(y) for x, y in batches]
        [256, 256, 256, 256, 256, 157]
        >>> x, steps, y = next(iter(loader(load_spikes("digits").train, 256, lengths=True)))
        >>> x.T, int(steps.max()) <= x.T
        (100, True)
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
    return DataLoader(
        _WithLengths(dataset) if lengths else dataset,
        batch_size=None,
        sampler=_Batches(len(dataset), batch_size, shuffle, generator, drop_last),
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # of the workers' seeds: the global one stays untouched
    )
