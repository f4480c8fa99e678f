"""The op in torch.library: schema, fake kernels, autograd registration, compiled graphs."""

import pytest
import torch
from helpers import on_grid, relative, spikes

from snn_sparse_plugin import NeuronParams, NeuronSpec, SpikeTrain, Surrogate, UnsupportedError
from snn_sparse_plugin.core.config import SparseConfig, use_config
from snn_sparse_plugin.ops import spiking_layer
from snn_sparse_plugin.ops.spiking_layer.library import encode_spec


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


SPECS = {
    "leaky": NeuronSpec(),
    "lif": NeuronSpec("euler", True, "value", "immediate", attached=True),
    "readout": NeuronSpec("euler", True, "none", spiking=False),
}


def arguments(spec, T=5, B=2, M=6, N=4, weights=True, recurrent=False, backend="cpu", requires_grad=True):
    def leaf(x):
        return x.requires_grad_(requires_grad)

    return (
        spikes(T, B, M if weights else N, p=0.2),
        leaf(on_grid(N, M)) if weights else None,
        leaf(on_grid(N)) if weights else None,
        leaf(on_grid(N, N)) if recurrent else None,
        None,
        leaf(on_grid(B, N)) if recurrent else None,
        leaf(torch.rand(B, N)),
        leaf(torch.rand(B, N)) if spec.synapse else None,
        leaf(torch.rand(5, N)),
        encode_spec(spec),
        "fast_sigmoid",
        [-1.0, 0.0, 10.0],
        backend,
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "current"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_opcheck(spec, weights, backend):
    op = torch.ops.snn_sparse_plugin.spiking_layer.default
    torch.library.opcheck(op, arguments(spec, weights=weights, backend=backend))


def test_opcheck_recurrent():
    op = torch.ops.snn_sparse_plugin.spiking_layer.default
    torch.library.opcheck(op, arguments(NeuronSpec(), recurrent=True))


@pytest.mark.parametrize("threshold", [None, 0.1, "auto"])
@pytest.mark.parametrize("recurrent", [False, True], ids=["feedforward", "recurrent"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiled_equals_eager_without_a_graph_break(backend, recurrent, threshold):
    x, w, beta = (
        spikes(40, 3, 20, p=0.2),
        on_grid(9, 20).requires_grad_(),
        torch.tensor(0.875, requires_grad=True),
    )
    rec = on_grid(9, 9, scale=0.25).requires_grad_() if recurrent else None
    g_spikes, g_mem = torch.randn(40, 3, 9), torch.randn(40, 3, 9)

    def layer(x, w, beta, rec):
        out = spiking_layer(
            x,
            w,
            params=NeuronParams(beta),
            recurrent_weight=rec,
            surrogate=Surrogate("fast_sigmoid", (25.0,)),
            return_mem=True,
            backend=backend,
            backprop_threshold=threshold,
        )
        return out.spikes, out.mem, out.state.v

    def gradients(out):
        loss = (out[0] * g_spikes).sum() + (out[1] * g_mem).sum() + out[2].sum()
        return torch.autograd.grad(loss, [p for p in (w, beta, rec) if p is not None])

    eager = layer(x, w, beta, rec)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, w, beta, rec)
    for a, b in zip(compiled, eager, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(compiled), gradients(eager), strict=True):
        assert b.norm() > 0
        assert relative(a, b) < 1e-5


def test_a_compiled_graph_obeys_the_context_it_runs_in():
    x, w = spikes(30, 3, 20, p=0.2), on_grid(9, 20).requires_grad_()
    params, surrogate = NeuronParams(0.875), Surrogate("fast_sigmoid", (25.0,))

    def layer(x, w):
        return spiking_layer(x, w, params=params, surrogate=surrogate).spikes

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(30, 3, 9)
    found = []
    for threshold in (None, 0.02):
        with use_config(SparseConfig(backprop_threshold=threshold, min_active=0)):
            pair = [torch.autograd.grad((f(x, w) * upstream).sum(), w)[0] for f in (layer, compiled)]
        assert relative(*pair) < 1e-5
        found.append(pair[0])
    assert relative(*found) > 1e-2


def test_backward_outside_the_context_uses_what_forward_decided():
    x, w = spikes(80, 3, 20, p=0.2), on_grid(9, 20).requires_grad_()
    upstream = torch.randn(80, 3, 9)
    layer = torch.compile(
        lambda x, w: spiking_layer(x, w, params=NeuronParams(0.875)).spikes,
        fullgraph=True,
        backend="aot_eager",
    )
    with use_config(SparseConfig(backend="reference", backprop_threshold=None)):
        out = layer(x, w)
        (inside,) = torch.autograd.grad((out * upstream).sum(), w, retain_graph=True)
    (outside,) = torch.autograd.grad((out * upstream).sum(), w)
    assert inside.norm() > 0
    assert torch.equal(inside, outside)


def test_events_do_not_enter_a_graph():
    train = SpikeTrain.from_dense(spikes(5, 2, 6))
    with pytest.raises(Exception, match="dense tensors"):
        torch.compile(
            lambda: spiking_layer(train, torch.zeros(4, 6), params=NeuronParams(0.9)),
            fullgraph=True,
            backend="eager",
        )()


def test_custom_surrogates_do_not_enter_a_graph():
    surrogate = Surrogate("custom", function=torch.sigmoid)
    x = spikes(5, 2, 6)
    with pytest.raises(Exception, match="custom surrogate"):
        torch.compile(
            lambda: spiking_layer(x, params=NeuronParams(0.9), surrogate=surrogate),
            fullgraph=True,
            backend="eager",
        )()
    assert issubclass(UnsupportedError, RuntimeError)
