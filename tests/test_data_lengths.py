"""Batches of recordings of different durations."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from snn_sparse_plugin import InputError, SpikeTrain
from snn_sparse_plugin.data import SpikeDataset, collate, from_tonic, loader


def recordings() -> SpikeDataset:
    x = torch.zeros(10, 4, 3)
    x[6, 0, 1] = x[2, 0, 0] = x[9, 1, 2] = x[0, 2, 0] = 1  # the fourth is silent
    return SpikeDataset.from_spikes(SpikeTrain.from_dense(x), torch.arange(4))


def test_up_to_the_last_event() -> None:
    data = recordings()
    assert data.lengths.tolist() == [7, 10, 1, 0]
    assert data.subset([2, 0]).lengths.tolist() == [1, 7]


def test_given_lengths_stay_with_their_samples() -> None:
    train = recordings().batch(range(4))[0]
    data = SpikeDataset.from_spikes(train, torch.arange(4), lengths=[8, 10, 5, 3])
    assert data.subset([3, 0]).lengths.tolist() == [3, 8]
    with pytest.raises(InputError, match="sample 0 has events after its 6 steps"):
        SpikeDataset.from_spikes(train, torch.arange(4), lengths=[6, 10, 5, 3])
    with pytest.raises(InputError, match=r"expected \(4,\)"):
        SpikeDataset.from_spikes(train, torch.arange(4), lengths=[6])


@pytest.mark.parametrize("workers", [0, 1])
def test_loader(workers: int) -> None:
    data = recordings()
    found = list(loader(data, 3, shuffle=True, num_workers=workers, lengths=True))
    assert [len(y) for _, _, y in found] == [3, 1]
    for x, lengths, y in found:
        assert lengths.tolist() == data.lengths[y].tolist()
        assert torch.equal(x.to_dense(), data.batch(y)[0].to_dense())


def test_collate_pads_to_the_longest() -> None:
    dense = [(torch.rand(t, b, 6) < 0.5).float() for t, b in ((4, 1), (9, 2), (1, 1), (0, 1))]
    samples = [(SpikeTrain.from_dense(x), k) for k, x in enumerate(dense)]
    x, lengths, y = collate(samples, lengths=True)
    assert lengths.tolist() == [4, 9, 9, 1, 0]
    assert y.tolist() == [0, 1, 2, 3]
    expected = [torch.cat([part, torch.zeros(9 - len(part), *part.shape[1:])]) for part in dense]
    assert torch.equal(x.to_dense(), torch.cat(expected, 1))
    graded = [(SpikeTrain.from_dense(part * 0.5), k) for k, part in enumerate(dense)]
    assert torch.equal(collate(graded, lengths=True)[0].to_dense(), torch.cat(expected, 1) * 0.5)
    batches = DataLoader(samples[:1] + samples[2:], batch_size=3, collate_fn=partial(collate, lengths=True))
    assert next(iter(batches))[1].tolist() == [4, 1, 0]
    with pytest.raises(InputError, match="lengths=True takes different steps"):
        collate(samples)


def test_from_tonic() -> None:
    kind = [("t", int), ("x", int), ("y", int), ("p", int)]
    short, long = np.array([(0, 1, 0, 1), (3500, 1, 0, 1)], kind), np.array([(99000, 0, 0, 0)], kind)
    data = from_tonic([(short, 0), (long, 1), (long[:0], 1)], 10, 1e-3, sensor_size=(2, 1, 2))
    assert data.lengths.tolist() == [4, 10, 0]  # the second goes on after the last step
