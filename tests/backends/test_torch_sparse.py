"""The torch_sparse backend against the reference: with the library where it is installed, else with a stand-in.

The stand-in has the few methods the backend uses, on torch's own CSR tensors; it tests our side of the border only.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import on_grid, relative, spikes

from snn_sparse_plugin import NeuronParams, NeuronSpec, SpikeTrain, Surrogate, UnsupportedError
from snn_sparse_plugin.core import registry
from snn_sparse_plugin.core.spikes import as_spike_train
from snn_sparse_plugin.ops import spiking_layer

try:
    import torch_sparse

    INSTALLED = True
except (ImportError, OSError):
    torch_sparse = None
    INSTALLED = False


class SparseTensor:
    """What ``torch_sparse.SparseTensor`` is to us."""

    def __init__(self, rowptr, col, value, sparse_sizes, is_sorted=False):
        assert rowptr.dtype == col.dtype == torch.int64  # as the library demands
        self._csr, self._sizes = (rowptr, col, value), sparse_sizes

    def _matrix(self):
        rowptr, col, value = self._csr
        value = torch.ones(col.numel()) if value is None else value
        return torch.sparse_csr_tensor(rowptr, col, value, size=self._sizes)

    def csr(self):
        return self._csr

    def sizes(self):
        return list(self._sizes)

    def matmul(self, other):
        return self._matrix() @ other

    def t(self):
        matrix = self._matrix().to_dense().t().to_sparse_csr()
        turned = (matrix.crow_indices(), matrix.col_indices(), matrix.values())
        return SparseTensor(*turned, tuple(matrix.shape))


@pytest.fixture(params=["real", "stand-in"])
def library(request, monkeypatch):
    if request.param == "real":
        if not INSTALLED:
            pytest.skip("torch_sparse is not installed")
    else:
        module = SimpleNamespace(SparseTensor=SparseTensor, __version__="0.0 (stand-in)")
        monkeypatch.setitem(sys.modules, "torch_sparse", module)
    registry.refresh()
    yield request.param
    registry.refresh()


SPECS = {"leaky": NeuronSpec(), "lif": NeuronSpec("euler", True, "value", "immediate", attached=True)}


@pytest.mark.parametrize("threshold", [None, 0.1])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_equals_the_reference(library, spec, threshold, counted):
    hidden = on_grid(9, 20, scale=1.5)
    last = on_grid(5, 9, scale=2.0)
    bias = on_grid(9, scale=0.25)
    x, upstream = spikes(40, 3, 20, p=0.3), torch.randn(40, 3, 5)
    options = {
        "spec": spec,
        "params": NeuronParams(0.875 if spec.update == "decay" else 0.25, 0.5),
        "surrogate": Surrogate("fast_sigmoid", (10.0,)),
        "backprop_threshold": threshold,
        "min_active": 0,
    }
    found = []
    for backend in ("reference", "torch_sparse"):
        leaves = [p.clone().requires_grad_() for p in (hidden, last, bias)]
        first = spiking_layer(
            SpikeTrain.from_dense(x), leaves[0], leaves[2], events=True, backend=backend, **options
        )
        out = spiking_layer(first.spikes, leaves[1], backend=backend, return_mem=True, **options)
        gradients = torch.autograd.grad((out.mem * upstream).sum(), leaves)
        found.append((out.spikes, out.mem, gradients))
    assert found[0][0].sum() > 0
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    for a, b in zip(found[1][2], found[0][2], strict=True):
        assert b.norm() > 0
        assert relative(a, b) < 1e-5
    assert counted["torch_sparse", "forward"] == 2
    assert counted["torch_sparse", "backward"] == 2


def test_trains_cross_the_border_both_ways(library):
    x = spikes(7, 3, 11)
    matrix = SpikeTrain.from_dense(x).to_torch_sparse()
    assert torch.equal(as_spike_train(matrix, batch_size=3).to_dense(), x)
    out = spiking_layer(SpikeTrain.from_torch_sparse(matrix, 3), on_grid(4, 11), params=NeuronParams(0.9))
    assert out.spikes.shape == (7, 3, 4)


@pytest.mark.skipif(INSTALLED, reason="torch_sparse is installed")
def test_asked_for_but_missing_says_what_to_install():
    registry.refresh()
    with pytest.raises(UnsupportedError, match=r"torch-scatter torch-sparse"):
        spiking_layer(spikes(3, 2, 4), on_grid(2, 4), params=NeuronParams(0.9), backend="torch_sparse")
