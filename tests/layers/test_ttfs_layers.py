"""TTFS layers and how they are trained."""

import copy
import io
import math
import shutil

import pytest
import torch
from helpers import relative
from torch import nn

from snn_sparse_plugin import ConfigError, InputError, UnsupportedError
from snn_sparse_plugin.core import registry
from snn_sparse_plugin.layers.ttfs import (
    TTFS,
    RelaxationSchedule,
    TTFSBatchNorm1d,
    TTFSBatchNorm2d,
    TTFSEncoder,
    TTFSMaxPool2d,
    TTFSReadout,
    kernel_regularization,
    spike_regularization,
    to_snn,
    to_ttfs,
    ttfs_loss,
)


def test_registered():
    plugin = registry.load("layers", "ttfs")
    assert plugin.name == "ttfs"
    assert TTFS in plugin.layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window must be a whole number of steps from 2 to 255, got 1"),
        ({"window": 256}, "from 2 to 255"),
        ({"window": 8.0}, "got 8.0"),
        ({"tau": 0.0}, "tau must be a finite number of steps > 0, got 0.0"),
        ({"tau": -3.0}, "got -3.0"),
        ({"tau": math.nan}, "got nan"),
        ({"tau": 0.1}, r"falls by more than e\^64 within 32 steps: take tau > 0.484"),
        ({"t_d": math.inf}, "t_d must be a finite"),
        ({"rounding": "up"}, "rounding must be one of ceil, nearest, floor"),
        ({"kernel": "sigmoid"}, "kernels are exp, power-of-two, linear"),
        ({"kernel": "linear"}, "negative before step 32: take tau > 31"),
    ],
    ids=str,
)
def test_options_outside_their_range(options, message):
    with pytest.raises(ConfigError, match=message):
        TTFS(**options)


def test_repr_and_parameters():
    assert repr(TTFS()) == "TTFS(window=32, tau=10, t_d=0)"
    assert repr(TTFS(16, 5.0, 1.0, False, "floor", "power-of-two")) == (
        "TTFS(window=16, tau=5, t_d=1, train_kernel=False, rounding='floor', kernel='power-of-two')"
    )
    assert {n for n, _ in TTFS().named_parameters()} == {"tau_raw", "t_d"}
    assert not list(TTFS(train_kernel=False).parameters())
    assert repr(TTFSReadout(3, 2)).startswith("TTFSReadout(in_features=3")


@pytest.mark.parametrize("kernel", ["exp", "power-of-two", "linear"])
def test_the_largest_and_smallest_value(kernel):
    layer = TTFS(kernel=kernel, tau=40.0, t_d=1.0, train_kernel=False)
    shape = {"exp": math.exp, "power-of-two": lambda u: 2**u, "linear": lambda u: 1 + u}[kernel]
    assert layer.x_M == pytest.approx(shape(1 / 40))
    assert layer.x_m == pytest.approx(shape(-30 / 40))
    out = layer(torch.tensor([layer.x_m, math.nextafter(layer.x_m, 0) - 1e-6, 100.0]))
    assert out.tolist() == pytest.approx([layer.x_m, 0.0, layer.x_M])


def test_powers_of_two_are_exact():
    layer = TTFS(window=8, tau=1.0, kernel="power-of-two", train_kernel=False)
    assert layer.table()[1].tolist() == [2.0**-k for k in range(8)]


def test_tau_stays_positive_and_its_drift_is_reported():
    layer = TTFS(window=16, tau=1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=50.0)
    for _ in range(20):
        optimizer.zero_grad()
        layer.tau.backward()  # pushes tau down
        optimizer.step()
    assert layer.tau.item() >= layer.tau_floor > 0
    assert layer.drifted
    out = layer(torch.rand(100, requires_grad=True))
    out.sum().backward()
    assert out.isfinite().all()
    assert layer(torch.zeros(3)).tolist() == [0, 0, 0]
    schedule = RelaxationSchedule(nn.Sequential(layer), target=0)
    with pytest.warns(UserWarning, match=r"0: tau has fallen to 0.234, its floor is 0.234"):
        schedule.step()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.step()
    model = nn.Sequential(TTFSEncoder(), nn.Linear(3, 3), layer, nn.Linear(3, 2)).eval()
    with pytest.warns(UserWarning, match="2: tau has fallen"):
        to_snn(model, torch.rand(1, 3))


def test_encoder_takes_intensities_only():
    encoder = TTFSEncoder()
    x = torch.tensor([0.0, 0.03, 0.5, 1.0])
    assert torch.equal(encoder(x), TTFS(train_kernel=False)(x))
    for bad, message in (
        (torch.tensor([0.5, 1.2]), r"intensities in \[0, 1\], got 0.5…1.2"),
        (torch.tensor([-0.1, 0.5]), "got -0.1…0.5"),
        (torch.tensor([0.1, math.nan]), "NaN"),
    ):
        with pytest.raises(InputError, match=message):
            encoder(bad)
    assert encoder(torch.zeros(0, 4)).shape == (0, 4)


def test_nan_stays_visible():
    out = TTFS()(torch.tensor([0.5, math.nan]))
    assert out.isnan().tolist() == [False, True]


def test_gradients_through_a_silent_network_are_zero():
    model = nn.Sequential(nn.Linear(4, 5), TTFS(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100)
    model(torch.rand(6, 4)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if name.startswith(("0", "1")):
            assert not parameter.grad.any(), name


def test_autocast_and_double():
    model = nn.Sequential(nn.Linear(4, 8), TTFS(), nn.Linear(8, 2))
    x = torch.rand(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.double()(x.double()).dtype == torch.float64


NO_COMPILER = not any(map(shutil.which, ("g++", "clang++", "c++")))


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[pytest.mark.slow, pytest.mark.skipif(NO_COMPILER, reason="inductor needs a C++ compiler")],
        ),
    ],
)
def test_compiled_training_step_equals_eager(backend):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 8), TTFS(), nn.Linear(8, 2))
    x = torch.rand(5, 4)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    for a, b in zip(
        found, torch.autograd.grad(model(x).square().sum(), list(model.parameters())), strict=True
    ):
        assert relative(a, b) < 1e-6


def test_gradients_of_single_samples_by_torch_func():
    model = nn.Sequential(TTFSEncoder(), nn.Linear(4, 8), TTFS(), nn.Linear(8, 2)).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.rand(5, 4, dtype=torch.float64)

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for k, sample in enumerate(x):
        expected = torch.autograd.grad(model(sample).square().sum(), list(model.parameters()))
        for a, b in zip(each.values(), expected, strict=True):
            assert relative(a[k], b) < 1e-12


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how):
    layer = TTFS(tau=7.0)
    layer.set_relaxation(0.25)
    if how == "deepcopy":
        again = copy.deepcopy(layer)
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
    assert again._relax == 0.25
    assert again.tau.item() == layer.tau.item()


def test_relaxation_falls_linearly_and_is_saved():
    model = nn.Sequential(TTFSEncoder(), nn.Linear(3, 3), TTFS(), nn.Linear(3, 3), TTFS())
    schedule = RelaxationSchedule(model, target=4)
    seen = []
    for _ in range(6):
        seen.append(schedule.probability)
        schedule.step()
    assert seen == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    schedule = RelaxationSchedule(model, target=4)
    schedule.step()
    other = nn.Sequential(TTFSEncoder(), nn.Linear(3, 3), TTFS(), nn.Linear(3, 3), TTFS())
    other.load_state_dict(model.state_dict())
    assert [m._relax for m in other if isinstance(m, TTFS)] == [0.0, 0.75, 0.75]
    resumed = RelaxationSchedule(other, target=99)
    resumed.load_state_dict(schedule.state_dict())
    assert (resumed.epoch, resumed.target, resumed.probability) == (1, 4, 0.75)
    assert repr(resumed) == "RelaxationSchedule(epoch=1, target=4, probability=0.75)"


def test_relaxed_steps_are_relu_in_training_only():
    model = nn.Sequential(TTFS())
    RelaxationSchedule(model, target=2)
    x = torch.randn(50)
    assert torch.equal(model(x), x.relu())
    assert not torch.equal(model.eval()(x), x.relu())
    model.train()[0].set_relaxation(0.4)
    relaxed = sum(bool(torch.equal(model(x), x.relu())) for _ in range(500))
    assert 150 < relaxed < 250


def test_relaxation_inside_a_compiled_graph():
    torch._dynamo.reset()
    layer = TTFS()
    layer.set_relaxation(0.5)
    graphs = []
    compiled = torch.compile(
        layer, fullgraph=True, backend=lambda graph, _: graphs.append(1) or graph.forward
    )
    x = torch.randn(40)
    relaxed = sum(bool(torch.equal(compiled(x), x.relu())) for _ in range(60))
    assert 10 < relaxed < 50
    layer.set_relaxation(0.01)
    relaxed = sum(bool(torch.equal(compiled(x), x.relu())) for _ in range(60))
    assert relaxed < 10
    assert len(graphs) == 1


def test_relaxation_needs_a_layer_and_a_target():
    with pytest.raises(ConfigError, match="no TTFS layer"):
        RelaxationSchedule(nn.Linear(2, 2), 3)
    with pytest.raises(ConfigError, match=">= 0, got -1"):
        RelaxationSchedule(nn.Sequential(TTFS()), -1)


def test_kernel_regularization():
    model = nn.Sequential(TTFS(tau=10.0), TTFS(tau=6.0, t_d=1.0), TTFS(train_kernel=False))
    assert kernel_regularization(model).item() == pytest.approx(0, abs=1e-8)
    with torch.no_grad():
        model[1].t_d += 2.0
        model[0].tau_raw += 1.0
    expected = (model[0].tau.item() - 10) ** 2 + 4
    assert kernel_regularization(model).item() == pytest.approx(expected, rel=1e-5)
    assert kernel_regularization(nn.Linear(2, 2)).item() == 0


def normalised(g, s, x_m_layer):
    model = nn.Sequential(nn.Linear(4, len(g)), TTFSBatchNorm1d(len(g)), x_m_layer)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(g))
        model[1].bias.copy_(torch.tensor(s))
    return model.double()


def test_spike_regularization_paper():
    g, s = [0.8, 1.3], [0.1, -0.4]
    model = normalised(g, s, TTFS())
    x = model[2].x_m
    expected = -sum(
        x - b + b**3 * (a * a / 6 + a / 2 + 0.5) - x * b * b / 2 - x * x * b * a / 2 - x**3 * a * a / 6
        for a, b in zip(g, s, strict=True)
    )
    loss = spike_regularization(model)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"1.weight", "1.bias"}


def test_spike_regularization_gaussian_is_the_share_that_fires():
    model = normalised([0.8, 1.3], [0.1, -0.4], TTFS())
    x_m = model[2].x_m
    draws = torch.randn(400_000, 2).double() * model[1].weight + model[1].bias
    share = (draws >= x_m).double().mean(0).sum().item()
    loss = spike_regularization(model, "gaussian")
    assert loss.item() == pytest.approx(share, abs=5e-3)
    assert torch.autograd.gradcheck(
        lambda g, s: torch.func.functional_call(_Loss(model), {"model.1.weight": g, "model.1.bias": s}, ()),
        (model[1].weight.detach().requires_grad_(), model[1].bias.detach().requires_grad_()),
    )


class _Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self):
        return spike_regularization(self.model, "gaussian")


def test_which_normalisation_belongs_to_which_layer():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = TTFS(window=8), TTFS(window=64)
            self.norm = TTFSBatchNorm2d(3).feeds(self.a)

    model = Crossed()
    table = spike_regularization(model, "gaussian")
    assert table.item() == pytest.approx(3 * (0.5 * math.erfc(model.a.x_m / math.sqrt(2))), rel=1e-5)
    assert copy.deepcopy(model).norm._partner[0].window == 8
    with pytest.raises(ConfigError, match="no batch normalisation"):
        spike_regularization(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), TTFS()))
    with pytest.raises(ConfigError, match="forms paper, gaussian"):
        spike_regularization(model, "exact")


def test_ttfs_loss_is_the_sum():
    model = normalised([0.8, 1.3], [0.1, -0.4], TTFS())
    with torch.no_grad():
        model[2].t_d += 1
    logits, target = torch.randn(5, 3).double(), torch.randint(3, (5,))
    ce = nn.functional.cross_entropy(logits, target)
    expected = ce + 0.1 * kernel_regularization(model) + 0.01 * spike_regularization(model, "gaussian")
    found = ttfs_loss(logits, target, model, tr=0.1, tb=0.01, form="gaussian")
    assert found.item() == pytest.approx(expected.item())
    assert ttfs_loss(logits, target, model).item() == ce.item()
    with pytest.raises(ConfigError, match="tb=-1"):
        ttfs_loss(logits, target, model, tb=-1)


def test_to_ttfs_replaces_by_type_and_keeps_the_weights():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    found = to_ttfs(model, window=16, tau=4.0)
    assert isinstance(found[0], TTFSEncoder)
    assert [type(m) for m in found[1]] == [nn.Conv2d, TTFSBatchNorm2d, TTFS, TTFSMaxPool2d]
    assert found[1][2].window == found[0].window == 16
    assert torch.equal(found[1][0].weight, model[0][0].weight)
    assert type(model[0][1]) is nn.BatchNorm2d
    with pytest.raises(Exception, match="no nn.ReLU"):
        to_ttfs(nn.Linear(2, 2))


def test_a_shared_relu_stays_shared():
    relu = nn.ReLU()
    found = to_ttfs(nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2), relu), encode=False)
    assert found[1] is found[3]


@pytest.mark.parametrize("library", ["snntorch", "norse"])
def test_to_ttfs_replaces_spiking_neurons(library):
    package = pytest.importorskip(library)
    if library == "snntorch":
        model = nn.Sequential(
            nn.Linear(6, 5),
            package.Leaky(beta=0.9, init_hidden=True),
            nn.Linear(5, 3),
            package.Leaky(beta=0.9, init_hidden=True, output=True),
        )
        recurrent = package.RLeaky(beta=0.9, linear_features=5, init_hidden=True)
    else:
        import norse.torch as norse

        model = norse.SequentialState(nn.Linear(6, 5), norse.LIFCell(), nn.Linear(5, 3), norse.LICell())
        recurrent = norse.LIFRecurrentCell(6, 5)
    ran = model(torch.rand(2, 6))  # snnTorch's neurons keep a state, and with it the graph
    found = to_ttfs(model, encode=False)
    ran[0].sum().backward()
    layers = list(found.children())
    assert isinstance(layers[1], TTFS)
    assert isinstance(layers[3], nn.Identity)
    assert found(torch.rand(2, 6)).shape == (2, 3)
    with pytest.raises(Exception, match=r"cannot replace 1 \(R?\w+\): it (feeds its spikes back|holds)"):
        to_ttfs(nn.Sequential(nn.Linear(6, 5), recurrent))


class Stepped(nn.Module):
    """Steps through time by hand, as tutorials do."""

    def __init__(self, neuron):
        super().__init__()
        self.fc, self.lif, self.out = nn.Linear(6, 5), neuron, nn.Linear(5, 3)

    def forward(self, x, state=None):
        spikes, state = self.lif(self.fc(x), state)
        return self.out(spikes), state


@pytest.mark.parametrize("library", ["snntorch", "norse"])
def test_to_ttfs_refuses_a_forward_that_hands_states_on(library):
    package = pytest.importorskip(library)
    if library == "norse":
        import norse.torch as package
    neuron = package.Leaky(beta=0.9) if library == "snntorch" else package.LIFCell()
    with pytest.raises(
        UnsupportedError, match=r"cannot replace lif \(\w+\): the forward around it hands it a state"
    ):
        to_ttfs(Stepped(neuron))
    if library == "snntorch":
        model = Stepped(package.Leaky(beta=0.9, init_hidden=True))
        assert isinstance(to_ttfs(model, encode=False).lif, TTFS)
