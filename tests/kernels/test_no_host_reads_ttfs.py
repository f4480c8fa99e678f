"""A time-to-first-spike layer on a device: nothing is read on the host, and few kernels run."""

import os

import pytest
import torch

pytest.importorskip("triton.language", reason="the triton extra is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in the environment", allow_module_level=True)

from no_host_reads import no_host_reads
from triton.runtime import interpreter

from snn_sparse_plugin.core import host
from snn_sparse_plugin.layers.ttfs import TTFS
from snn_sparse_plugin.ops.ttfs import get_kernel, spike_table

pytestmark = pytest.mark.triton_interpreter


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched, in order."""
    names = []
    launch = interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("train_kernel", [True, False])
@pytest.mark.parametrize("kernel", ["exp", "power-of-two", "linear"])
def test_a_layer(monkeypatch, launched, kernel, train_kernel, dtype):
    layer = TTFS(tau=40.0, t_d=0.5, kernel=kernel, train_kernel=train_kernel, backend="triton")
    x = torch.randn(3, 5, 7, dtype=dtype, requires_grad=True)
    with no_host_reads(monkeypatch):
        out = layer(x)
        out.backward(torch.ones_like(out))
    assert x.grad.isfinite().all()
    assert (layer.tau_raw.grad is not None) if train_kernel else not list(layer.parameters())
    sums = ["ttfs_parameters"] if train_kernel else []
    assert launched == ["ttfs_table", "ttfs_forward", "ttfs_backward", *sums]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounding", ["ceil", "nearest", "floor"])
@pytest.mark.parametrize("kernel", ["exp", "power-of-two", "linear"])
def test_the_table_of_the_kernel_is_torchs(monkeypatch, launched, kernel, rounding, dtype):
    for window, tau, t_d in ((2, 3.0, 0.0), (32, 40.0, 0.7), (255, 300.0, -1.5), (255, 0.9, 200.0)):
        arguments = get_kernel(kernel), window, torch.tensor(tau), torch.tensor(t_d)
        expected = spike_table(*arguments, rounding=rounding, dtype=dtype)
        with monkeypatch.context() as patch:
            patch.setattr(host, "HOSTS", frozenset())
            found = spike_table(*arguments, rounding=rounding, dtype=dtype)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert launched == ["ttfs_table"] * 4
