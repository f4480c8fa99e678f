"""Nothing on a GPU's path reads the device on the host: forward and backward can be captured in a CUDA graph.

Shown without a device: the interpreter's kernels on CPU tensors, in a block where every read raises.
"""

import os

import pytest
import torch
from torch import nn

pytest.importorskip("triton.language", reason="the triton extra is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in the environment", allow_module_level=True)

from equation_cases import ADAPTIVE
from layer_cases import FAST_SIGMOID, RECURRENT, make_inputs
from no_host_reads import HostRead, no_host_reads

from snn_sparse_plugin import NeuronParams, NeuronSpec, SpikeTrain, record_activity, sparse_mode, unroll
from snn_sparse_plugin.backends import calls
from snn_sparse_plugin.core import host
from snn_sparse_plugin.core.dynamics import NeuronState
from snn_sparse_plugin.ops.spiking_layer import spiking_layer
from snn_sparse_plugin.ops.spiking_layer.library import spiking_layer_op

pytestmark = pytest.mark.triton_interpreter
WINDOW = {"backprop_threshold": 0.3, "backend": "triton"}


@pytest.fixture
def reads_nothing(monkeypatch):
    """``run(step)``: once to warm up, as before a capture, then once more without a read."""

    def run(step, launches=True):
        with monkeypatch.context() as patch:
            patch.setattr(host, "HOSTS", frozenset())
            step()
        before = calls["triton", "forward"], calls["triton", "backward"]
        with no_host_reads(monkeypatch):
            step()
        after = calls["triton", "forward"], calls["triton", "backward"]
        assert all(a > b for a, b in zip(after, before, strict=True)) == launches

    return run


def inputs(spec=None, T=5, B=2, M=4, N=6, **options):
    tensors = make_inputs(spec or NeuronSpec(), T, B, M, N, **options)
    return {name: x.requires_grad_(name != "x") for name, x in tensors.items()}


FORMS = {
    "binary": lambda x: x,
    "graded": lambda x: x * 0.5,
    "wants a gradient": lambda x: x.clone().requires_grad_(),
    "the same at every step": lambda x: x[:1].expand(len(x), -1, -1),
    "strided": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "events": SpikeTrain.from_dense,
    "graded events": lambda x: SpikeTrain.from_dense(x * 0.5),
    "bits": lambda x: SpikeTrain.from_words(SpikeTrain.from_dense(x).words, x.shape),
}


@pytest.mark.parametrize("min_active", [0.0, 0.001])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_input(reads_nothing, form, min_active):
    given = inputs()
    x = FORMS[form](given["x"])

    def step():
        params = NeuronParams(mem=given["mem"], threshold=given["threshold"])
        options = {"min_active": min_active, "return_mem": True} | WINDOW
        out = spiking_layer(x, given["weight"], given["bias"], params=params, **options)
        (out.spikes.sum() + out.mem.sum() + out.state.v.sum() + 0 * out.active_fraction).backward()

    reads_nothing(step)
    assert given["weight"].grad is not None


def test_bf16_terms(reads_nothing, monkeypatch):
    from snn_sparse_plugin.triton_kernels import choice, crossovers, terms

    used = []
    monkeypatch.setattr(choice, "of_device", lambda _: crossovers.H100._replace(terms_from=0))
    monkeypatch.setattr(choice, "adds_rows_of_bits", lambda *_: False)
    for name in ("current", "input_gradient"):
        made = getattr(terms, name)
        monkeypatch.setattr(terms, name, lambda *a, made=made, name=name: used.append(name) or made(*a))
    given = inputs(N=8)
    x = given["x"].requires_grad_()

    def step():
        train = SpikeTrain.from_dense(x, binary=True)
        out = spiking_layer(train, given["weight"], given["bias"], params=NeuronParams(mem=0.9), **WINDOW)
        out.spikes.sum().backward()

    reads_nothing(step)
    assert used == ["current", "current", "input_gradient"] * 2


@pytest.mark.parametrize("events", [False, True], ids=["dense", "events"])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent(reads_nothing, name, events):
    spec = RECURRENT[name]
    given = inputs(spec, recurrent=True)
    params = NeuronParams(**{k: given[k] for k in NeuronParams._fields})
    state = NeuronState(given["v"], given["i"] if spec.synapse else None, given["spikes"])
    synapses = {k: given[k] for k in ("recurrent_weight", "recurrent_bias")}

    def step():
        out = spiking_layer(
            given["x"],
            given["weight"],
            spec=spec,
            params=params,
            state=state,
            events=events,
            **synapses,
            **WINDOW,
        )
        spikes = out.spikes.to_dense() if events else out.spikes
        (spikes.sum() + out.state.spikes.sum()).backward()

    reads_nothing(step)


def test_readout(reads_nothing):
    spec = NeuronSpec(reset="none", spiking=False)
    given = inputs(spec)

    def step():
        out = spiking_layer(given["x"], given["weight"], spec=spec, params=NeuronParams(mem=0.9), **WINDOW)
        out.spikes.sum().backward()

    reads_nothing(step)


def test_layers_joined_by_events(reads_nothing):
    first, second = inputs(), inputs(M=6, N=3)
    params = NeuronParams(mem=0.9, threshold=0.7)

    def step():
        x = SpikeTrain.from_dense(first["x"], binary=True)
        hidden = spiking_layer(x, first["weight"], params=params, events=True, **WINDOW).spikes
        out = spiking_layer(hidden, second["weight"], params=params, events=True, **WINDOW).spikes
        view = out.view(-1).flatten()
        (
            view.counts().sum() + view.step(2).sum() + out.to_dense().sum() + hidden.detach().counts().sum()
        ).backward()

    reads_nothing(step)
    assert (first["weight"].grad != 0).any()


def test_as_an_op_of_a_graph(monkeypatch):
    spec = RECURRENT["lif-recurrent"]
    given = inputs(spec, recurrent=True)
    rec0 = given["spikes"].detach() @ given["recurrent_weight"].detach().t()
    params = torch.stack([given[k].detach() for k in NeuronParams._fields])
    leaves = (given["x"], given["weight"], given["bias"], given["recurrent_weight"], given["recurrent_bias"])
    on_the_device = (*leaves, rec0, given["v"], given["i"], params)
    # the names and windows that travel through a graph are tensors of the host
    with no_host_reads(monkeypatch, methods=("numpy", "cpu")):
        spikes, *_ = spiking_layer_op(on_the_device, spec, FAST_SIGMOID, dict(WINDOW))
        spikes.sum().backward()


def test_equations(reads_nothing):
    given = inputs()
    params = dict.fromkeys(ADAPTIVE.program.params, 0.5)

    def step():
        options = {"spec": ADAPTIVE, "params": params, "events": True} | WINDOW
        out = spiking_layer(given["x"], given["weight"], **options)
        (out.spikes.to_dense().sum() + out.state["v"].sum()).backward()

    reads_nothing(step)


def snntorch_net(init_hidden=True):
    snn = pytest.importorskip("snntorch")
    hidden = {"beta": 0.9, "threshold": 0.5, "init_hidden": init_hidden}
    return nn.Sequential(
        nn.Linear(4, 6), snn.Leaky(**hidden), nn.Linear(6, 3), snn.Leaky(**hidden, output=True)
    )


def norse_net():
    norse = pytest.importorskip("norse.torch")
    return norse.SequentialState(nn.Linear(4, 6), norse.LIFCell(), nn.Linear(6, 3), norse.LICell())


@pytest.mark.parametrize("events", [False, True], ids=["dense", "events"])
@pytest.mark.parametrize("build", [snntorch_net, norse_net])
def test_unroll(reads_nothing, build, events):
    net, x = build(), inputs()["x"]
    if events and build is norse_net:
        net = type(net)(*list(net)[:2])
    utils = pytest.importorskip("snntorch.utils") if build is snntorch_net else None

    def step():
        if utils is not None:
            utils.reset(net)
        out = unroll(net, x, events=events, **WINDOW).spikes
        (out.to_dense() if events else out).sum().backward()

    reads_nothing(step)


@pytest.mark.parametrize("fuse_time", [True, False], ids=["recorded", "stepped"])
def test_a_loop_in_sparse_mode(reads_nothing, fuse_time):
    snn = pytest.importorskip("snntorch")
    first, second = nn.Linear(4, 6), nn.Linear(6, 3)
    lif1, lif2 = snn.Leaky(beta=0.9, threshold=0.5), snn.Leaky(beta=0.9, threshold=0.5)
    x = inputs()["x"]

    def step():
        with sparse_mode(fuse_time=fuse_time, **WINDOW):
            mem1, mem2, out = lif1.init_leaky(), lif2.init_leaky(), []
            for t in range(len(x)):
                spikes, mem1 = lif1(first(x[t]), mem1)
                spikes, mem2 = lif2(second(spikes), mem2)
                out.append(spikes)
            torch.stack(out).sum().backward()

    reads_nothing(step, launches=fuse_time)  # single steps are upstream's own


def test_recorded_activity_is_read_when_it_is_asked_for(reads_nothing):
    net, x, logs = snntorch_net(), inputs()["x"], []
    utils = pytest.importorskip("snntorch.utils")

    def step():
        utils.reset(net)
        with record_activity(net) as log:
            unroll(net, x, **WINDOW).spikes.sum().backward()
        logs.append(log)

    reads_nothing(step)
    assert logs[0].mean() == logs[1].mean()
    assert 0 < logs[1]["1"][0].rate < 1


@pytest.mark.parametrize(
    "read",
    [
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, x),
        lambda x: torch.repeat_interleave(torch.arange(len(x)), x.long()),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.__setitem__(x > 0, 1.0 * torch.ones(2)),
        lambda x: SpikeTrain.from_dense(x.view(1, 1, -1)),
        lambda x: SpikeTrain.from_dense(x.view(1, 1, -1), binary=True).indices,
    ],
)
def test_a_read_is_seen(monkeypatch, read):
    with pytest.raises(HostRead), no_host_reads(monkeypatch):
        read(torch.tensor([0.0, 1.0, 1.0]))


def test_a_convolutional_network(reads_nothing):
    snn = pytest.importorskip("snntorch")
    utils = pytest.importorskip("snntorch.utils")
    net = nn.Sequential(
        *(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), snn.Leaky(0.9, init_hidden=True)),
        *(nn.Conv2d(2, 2, 2), snn.Leaky(0.9, init_hidden=True)),
        *(nn.Flatten(), nn.Linear(2, 2), snn.Leaky(0.9, init_hidden=True, output=True)),
    )
    x = (torch.rand(3, 2, 1, 6, 6) < 0.5).float()

    def step():
        utils.reset(net)
        with sparse_mode(**WINDOW):
            unroll(net, x).mem.sum().backward()

    reads_nothing(step)
