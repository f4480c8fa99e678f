"""Searches over options: many trainings one after another in one process, and data loaded by spawned workers."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

snntorch = pytest.importorskip("snntorch", reason="snnTorch is not installed")

from frameworks.networks import Looping, batch, loss_of  # noqa: E402

from snn_sparse_plugin import SpikeTrain, sparse_mode, sparsify  # noqa: E402
from snn_sparse_plugin.data import collate  # noqa: E402


def trial(threshold: float | None, *, bound: bool) -> tuple[float, weakref.ref]:
    """A short training; the last loss, and a reference to a neuron of its model."""
    model = Looping()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    if bound:
        sparsify(model, backprop_threshold=threshold)

    def train() -> float:
        for _ in range(4):
            optimizer.zero_grad()
            loss = loss_of(model(batch()))
            loss.backward()
            optimizer.step()
        return loss.item()

    if bound:
        return train(), weakref.ref(model.net[1])
    with sparse_mode(backprop_threshold=threshold):
        return train(), weakref.ref(model.net[1])


@pytest.mark.parametrize("bound", [True, False], ids=["sparsify", "sparse_mode"])
def test_trials_do_not_know_each_other(bound: bool) -> None:
    """The same options give the same numbers whatever ran before, and a trial's model is gone after it."""
    options = (None, 0.3, "auto", 0.3, None)
    found = [trial(threshold, bound=bound) for threshold in options]
    losses = [loss for loss, _ in found]
    assert losses[0] == losses[4]
    assert losses[1] == losses[3]
    snntorch.SpikingNeuron.instances.clear()  # snnTorch itself keeps every neuron that was ever built
    gc.collect()
    alive = [neuron() for _, neuron in found if neuron() is not None]
    assert len(alive) <= 1  # the last record may hold its own


def test_a_search_with_optuna() -> None:
    optuna = pytest.importorskip("optuna", reason="optuna is not installed")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda t: trial(t.suggest_float("window", 0.05, 1.0), bound=True)[0], n_trials=3)
    assert study.best_value == trial(study.best_params["window"], bound=True)[0]


class Recordings(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[SpikeTrain, int]:
        generator = torch.Generator().manual_seed(index)
        return SpikeTrain.from_dense((torch.rand(12, 1, 12, generator=generator) < 0.3).float()), index


def test_workers_that_are_spawned() -> None:
    options = {"batch_size": 3, "collate_fn": collate}
    here = list(torch.utils.data.DataLoader(Recordings(), **options))
    spawned = torch.utils.data.DataLoader(
        Recordings(), num_workers=1, multiprocessing_context="spawn", **options
    )
    with sparse_mode():  # which stays in this process
        for (x, y), (same, label) in zip(spawned, here, strict=True):
            assert torch.equal(x.to_dense(), same.to_dense())
            assert torch.equal(y, label)
            loss_of(Looping()(x.to_dense())).backward()
