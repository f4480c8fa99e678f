import os
import sys

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

from snn_sparse_plugin.backends import calls


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_neurons_alive() -> None:
    """snnTorch keeps every neuron ever built, and its ``reset`` and ``detach_hidden`` reach those of other tests."""
    if "snntorch" in sys.modules:
        sys.modules["snntorch"].SpikingNeuron.instances.clear()


@pytest.fixture
def counted():
    """The call counters of the backends, empty at the start of the test."""
    calls.clear()
    return calls


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
