"""The spiking network against the trained one: both simulators, spike for spike."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from snn_sparse_plugin import ConfigError, InputError, UnsupportedError
from snn_sparse_plugin.layers.ttfs import (
    SILENT,
    TTFS,
    TTFSBatchNorm1d,
    TTFSBatchNorm2d,
    TTFSEncoder,
    TTFSMaxPool2d,
    TTFSNetwork,
    TTFSReadout,
    to_snn,
    to_ttfs,
)

SIMULATORS = ("clock", "event")


def mlp(**options):
    return nn.Sequential(
        TTFSEncoder(),
        nn.Linear(20, 30),
        TTFSBatchNorm1d(30),
        TTFS(**options),
        nn.Dropout(0.2),
        nn.Linear(30, 25),
        TTFS(window=16, tau=5.0),
        TTFSReadout(25, 10),
    )


def conv():
    return nn.Sequential(
        TTFSEncoder(window=24, tau=8.0),
        nn.Conv2d(2, 6, 3, padding=1),
        TTFSBatchNorm2d(6),
        TTFS(t_d=1.0),
        TTFSMaxPool2d(2),
        nn.Conv2d(6, 8, 3, stride=2, groups=2, bias=False),
        nn.BatchNorm2d(8),
        TTFS(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 8, (1, 3), padding=(0, 2), dilation=2),
        nn.MaxPool2d((1, 2)),
        TTFS(),
        nn.Flatten(),
        nn.Linear(8 * 2, 12),
        TTFS(),
        TTFSReadout(12, 5),
    )


SHAPES = {"mlp": (20,), "conv": (2, 19, 19)}


def trained(model, shape, n=24):
    """In eval mode, with statistics of batch normalisation that are not those it starts with."""
    x = torch.rand(n, *shape) * (torch.rand(n, *shape) < 0.6)
    model.train()
    for _ in range(3):
        model(x)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.uniform_(0.7, 1.4)
                module.bias.uniform_(-0.2, 0.5)
    return model.eval(), x


@pytest.mark.parametrize("simulator", SIMULATORS)
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_all_spike_times_are_equal_on_the_grid(kind, simulator):
    model, x = trained({"mlp": mlp, "conv": conv}[kind](), SHAPES[kind], 40)
    net = to_snn(model, x[:1], exact_grid=True)
    report = net.verify(x, simulator=simulator, batch_size=16)
    assert (report.equal, report.differing, report.worst_membrane) == (1.0, 0, 0.0)
    assert report.first is None
    assert report.compared == 40 * sum(
        math.prod(net.run(x[:1], record=True).times[s.name].shape) for s in net.stages[:-1]
    )
    run = net.run(x, record=True)
    for stage in net.stages[:-1]:
        assert (run.times[stage.name] != SILENT).any(), stage.name
        assert (run.times[stage.name] == SILENT).any(), stage.name


@pytest.mark.parametrize("simulator", SIMULATORS)
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_plain_floats_differ_by_rounding_only(kind, simulator):
    model, x = trained({"mlp": mlp, "conv": conv}[kind](), SHAPES[kind])
    report = to_snn(model, x[:1]).verify(x, simulator=simulator)
    assert report.equal > 0.999
    assert report.first is None or "rounded to two sides" in report.first or "earlier layer" in report.first
    double = to_snn(model.double(), x[:1].double()).verify(x.double(), simulator=simulator)
    assert double.equal == 1.0
    assert double.worst_membrane < 1e-12


@pytest.mark.parametrize("rounding", ["nearest", "floor"])
@pytest.mark.parametrize("kernel", ["exp", "power-of-two", "linear"])
def test_every_kernel_and_rounding(kernel, rounding):
    model, x = trained(mlp(kernel=kernel, rounding=rounding, tau=40.0 if kernel == "linear" else 8.0), (20,))
    net = to_snn(model, x[:1])
    for simulator in SIMULATORS:
        assert net.verify(x, exact_grid=True, simulator=simulator).equal == 1.0


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    channels=st.sampled_from([(1, 1, 1), (3, 5, 1), (4, 6, 2), (3, 3, 3)]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.integers(1, 2),
    pool=st.sampled_from(
        [None, nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.MaxPool2d(2, ceil_mode=True)]
    ),
    early=st.sampled_from([None, 1, 5, 9]),
)
def test_simulators_agree_on_any_convolution(channels, kernel, stride, padding, dilation, pool, early):
    torch.manual_seed(0)
    cin, cout, groups = channels
    layer = nn.Conv2d(cin, cout, kernel, stride, padding, dilation, groups)
    nn.init.normal_(layer.weight, std=0.7)
    layers = [
        TTFSEncoder(window=10, tau=4.0),
        *([pool] if pool else []),
        layer,
        TTFS(window=9, tau=3.0),
        nn.Flatten(),
    ]
    model = nn.Sequential(*layers)
    x = torch.rand(3, cin, 12, 13)
    features = model(x).shape[1]
    model = nn.Sequential(*layers, nn.Linear(features, 4)).eval()
    net = to_snn(model, x, exact_grid=True)
    clock, event = (net.run(x, simulator=s, early_firing=early, record=True) for s in SIMULATORS)
    for name, times in clock.times.items():
        assert torch.equal(times, event.times[name])
        assert torch.equal(clock.spikes[name], event.spikes[name])
    assert torch.equal(clock.output, event.output)
    if early is None:
        assert net.verify(x).equal == 1.0


def test_nothing_is_computed_without_spikes(counted):
    model, x = trained(mlp(), (20,))
    net = to_snn(model, x[:1])
    run = net.run(torch.zeros(3, 20))
    assert run.spikes["input"].tolist() == [0, 0, 0]
    assert run.synops["3"].tolist() == [0, 0, 0]
    assert counted["cpu", "ttfs_events"] == 3
    one = torch.zeros(1, 20)
    one[0, 4] = 1
    assert net.run(one).synops["3"].tolist() == [30]


@pytest.mark.parametrize("early", [None, 6])
def test_synaptic_operations_are_spikes_times_fan_out(early):
    model, x = trained(conv(), SHAPES["conv"])
    net = to_snn(model, x[:1])
    run = net.run(x, early_firing=early, record=True)
    arriving = run.times["input"]
    for stage in net.stages:  # spikes through synapses of ones
        spikes, cells = (stage.pooled(arriving) != SILENT).float(), 1
        if stage.average is not None:
            spikes, cells = stage.average.average(spikes), math.prod(stage.average.kernel)
        ones = replace(stage, weight=torch.ones_like(stage.weight), bias=None, before=[])
        expected = (ones.synapses(spikes) * cells).flatten(1).sum(1).round().long()
        assert torch.equal(run.synops[stage.name], expected), stage.name
        arriving = run.times.get(stage.name, arriving)


@pytest.mark.parametrize("simulator", SIMULATORS)
def test_early_firing(simulator):
    model, x = trained(mlp(), (20,))
    net = to_snn(model, x[:1], exact_grid=True)
    late = net.run(x, simulator=simulator, record=True)
    assert late.latency == 32 + 32 + 16
    same = net.run(x, simulator=simulator, early_firing=31, record=True)
    for name, times in late.times.items():  # the last spikes arrive at step 31: no neuron has to guess
        if name != "6":
            assert torch.equal(times, same.times[name])
    early = net.run(x, simulator=simulator, early_firing=4, record=True)
    assert early.latency == 4 + 4 + 16
    assert not torch.equal(early.times["3"], late.times["3"])
    # a neuron that fires early has reached its threshold with what had arrived
    assert (early.times["3"] != SILENT).any()


def test_several_threads_give_the_same():
    model, x = trained(conv(), SHAPES["conv"])
    net = to_snn(model, x[:1])
    one = net.run(x, record=True)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        many = net.run(x, record=True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.output, many.output)
    assert all(torch.equal(one.times[k], many.times[k]) for k in one.times)


def test_a_module_with_a_forward_of_its_own():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.spike = TTFSEncoder(), TTFS()
            self.conv, self.pool = nn.Conv2d(1, 4, 3), nn.MaxPool2d(2)
            self.hidden, self.out = nn.Linear(36, 20), nn.Linear(20, 3)

        def forward(self, x):
            x = self.pool(self.spike(self.conv(self.encode(x))))
            x = self.spike(self.hidden(x.flatten(1)))
            return self.out(x)

    model, x = Net().eval(), torch.rand(20, 1, 8, 8)
    net = to_snn(model, x[:1])
    assert [s.name for s in net.stages] == ["spike", "spike#2", "out"]
    for simulator in SIMULATORS:
        report = net.verify(x, exact_grid=True, simulator=simulator)
        assert report.equal == 1.0
    assert net.verify(x).worst_membrane < 1e-5


class Functional(nn.Module):
    """A network as it is written by hand: pooling, reshaping and dropout as functions, sizes read from tensors."""

    def __init__(self, body):
        super().__init__()
        self.encode, self.spike, self.body = TTFSEncoder(), TTFS(), body
        self.conv, self.hidden = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(16, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        x = self.body(self, x)
        return self.out(F.dropout(self.spike(self.hidden(x)), 0.3, self.training))


FUNCTIONAL = {
    "pool-view": lambda m, x: F.max_pool2d(m.spike(m.conv(m.encode(x))), 4).view(x.size(0), -1),
    "pool-membranes": lambda m, x: m.spike(F.max_pool2d(m.conv(m.encode(x)), (4, 4), 4)).reshape(-1, 16),
    "average": lambda m, x: torch.flatten(F.avg_pool2d(m.spike(m.conv(m.encode(x))), kernel_size=4), 1),
    "adaptive": lambda m, x: F.adaptive_avg_pool2d(m.spike(m.conv(m.encode(x))), 2).flatten(1),
    "adaptive-max": lambda m, x: F.adaptive_max_pool2d(m.spike(m.conv(m.encode(x))), (2, 2)).flatten(1),
    "size-of-the-window": lambda m, x: F.avg_pool2d(m.spike(m.conv(m.encode(x))), x.shape[-1] // 2).flatten(
        1
    ),
    "input-reshaped": lambda m, x: F.max_pool2d(
        m.spike(m.conv(m.encode(x.flatten(1).view(-1, 8, 8)).unsqueeze(1))), 4
    ).flatten(1),
}


@pytest.mark.parametrize("body", FUNCTIONAL)
def test_functions_are_mapped_as_their_modules(body):
    torch.manual_seed(0)
    model, x = Functional(FUNCTIONAL[body]).eval(), torch.rand(9, 1, 8, 8)
    net = to_snn(model, x[:1])
    assert len(net.stages) == 3
    for simulator in SIMULATORS:
        report = net.verify(x, exact_grid=True, simulator=simulator)
        assert (report.equal, report.same_class) == (1.0, 1.0)
    assert net.verify(x).worst_membrane < 1e-5


FUNCTIONAL_BAD = {
    "dropout": (lambda m, x: F.dropout(m.encode(x).flatten(1))[:, :16], "drops in eval mode too"),
    "weights": (
        lambda m, x: F.linear(m.encode(x).flatten(1), torch.eye(64)[:16]),
        "a tensor used outside a layer",
    ),
    "batch": (lambda m, x: m.encode(x).view(-1, 16), "does not keep the batch dimension"),
    "transposed": (lambda m, x: m.encode(x).transpose(2, 3).flatten(1)[:, :16], "no rule for this function"),
    "joined": (
        lambda m, x: torch.cat([m.encode(x).flatten(1)[:, :8]] * 2, 1),
        "no rule for this function|parallel paths",
    ),
    "relu": (lambda m, x: F.relu(m.conv(m.encode(x))).flatten(1), "convert the model with to_ttfs"),
}


@pytest.mark.parametrize("body", FUNCTIONAL_BAD)
def test_functions_that_cannot_be_mapped_are_named(body):
    function, message = FUNCTIONAL_BAD[body]
    shape = (4, 1, 8, 8) if body != "relu" else (4, 1, 2, 2)
    model = Functional(lambda m, x: function(m, x)).eval()
    with pytest.raises(UnsupportedError, match=message):
        to_snn(model, torch.rand(shape))


def test_flat_images_are_unflattened():
    layers = [
        TTFSEncoder(),
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 3, 3),
        TTFS(),
        nn.Flatten(),
        nn.Linear(108, 4),
    ]
    model, x = nn.Sequential(*layers).eval(), torch.rand(9, 64)
    for simulator in SIMULATORS:
        assert to_snn(model, x).verify(x, exact_grid=True, simulator=simulator).equal == 1.0


def test_a_network_without_readout_gives_the_last_layers_values():
    model = nn.Sequential(TTFSEncoder(), nn.Linear(6, 5), TTFS()).eval()
    x = torch.rand(9, 6)
    torch.testing.assert_close(to_snn(model, x)(x), model(x).detach())


def test_a_difference_is_found_and_explained():
    model, x = trained(mlp(), (20,))
    net = to_snn(model, x[:1])
    net.stages[0].weight[3] += 0.5
    report = net.verify(x)
    assert report.equal < 1
    assert report.differing == round((1 - report.equal) * report.compared)
    assert "3, sample 0" in report.first
    assert "differ by more than rounding" in report.first
    assert "\n" not in str(report)
    assert str(report).startswith(f"{100 * report.equal:.5f} % of {report.compared} spike times equal")


def test_verify_reports_progress_and_wants_samples():
    model, x = trained(mlp(), (20,))
    seen = []
    to_snn(model, x[:1]).verify(x, batch_size=10, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(10, 24), (20, 24), (24, 24)]
    with pytest.raises(InputError, match="at least one sample"):
        to_snn(model, x[:1]).verify(x[:0])


def test_saved_and_loaded(tmp_path):
    model, x = trained(conv(), SHAPES["conv"])
    net = to_snn(model, x[:1], exact_grid=True)
    net.save(tmp_path / "net.pt")
    again = TTFSNetwork.load(tmp_path / "net.pt")
    assert repr(again) == repr(net)
    assert torch.equal(again(x), net(x))
    assert again.verify(x).equal == 1.0
    with pytest.raises(InputError, match="there is no file"):
        TTFSNetwork.load(tmp_path / "none.pt")
    data = torch.load(tmp_path / "net.pt", weights_only=True)
    for other in (
        {"a": 1},
        data | {"stages": [{"name": "2"}]},
        {k: v for k, v in data.items() if k != "encoder"},
    ):
        torch.save(other, tmp_path / "other.pt")
        with pytest.raises(InputError, match=r"not a network written by TTFSNetwork.save"):
            TTFSNetwork.load(tmp_path / "other.pt")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.fc, self.spike = TTFSEncoder(), nn.Linear(4, 4), TTFS()

    def forward(self, x):
        x = self.encode(x)
        return self.spike(self.fc(x) + x)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


BAD = {
    "no-encoder": (
        nn.Sequential(nn.Linear(4, 4), TTFS()),
        r"cannot map 0 \(Linear\).*put a TTFSEncoder first",
    ),
    "relu": (nn.Sequential(TTFSEncoder(), nn.Linear(4, 4), nn.ReLU()), r"cannot map 2 \(ReLU\).*to_ttfs"),
    "lstm": (nn.Sequential(TTFSEncoder(), nn.GELU()), r"cannot map 1 \(GELU\): there is no rule"),
    "two-linear": (
        nn.Sequential(TTFSEncoder(), nn.Linear(4, 4), nn.Linear(4, 4)),
        r"cannot map 2 \(Linear\): there is no TTFS layer between it and 1",
    ),
    "two-neurons": (
        nn.Sequential(TTFSEncoder(), nn.Linear(4, 4), TTFS(), TTFS()),
        r"cannot map 3 \(TTFS\).*no synapses",
    ),
    "norm-behind": (
        nn.Sequential(TTFSEncoder(), nn.Linear(4, 4), TTFS(), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        r"cannot map 3 \(BatchNorm1d\).*right before",
    ),
    "softmax": (nn.Sequential(TTFSEncoder(), nn.Linear(4, 4), nn.Softmax(1)), "leave it to the loss"),
    "residual": (Residual(), "residual and parallel paths are not mapped"),
    "branch": (Branching(), "torch.fx cannot trace Branching"),
    "nothing": (nn.Sequential(TTFSEncoder()), "no synapses"),
}


@pytest.mark.parametrize("case", BAD)
def test_layers_that_cannot_be_mapped_are_named(case):
    model, message = BAD[case]
    with pytest.raises(UnsupportedError, match=message):
        to_snn(model.eval(), torch.rand(2, 4))


IMAGE_BAD = {
    "average-membranes": ([nn.Conv2d(1, 2, 3), nn.AvgPool2d(2), TTFS()], "put it behind the TTFS layer"),
    "overlapping": ([nn.AvgPool2d(3, 1), nn.Conv2d(1, 2, 3), TTFS()], "windows side by side"),
    "max-of-average": ([nn.AvgPool2d(2), nn.MaxPool2d(2), nn.Conv2d(1, 2, 1)], "the earliest"),
    "padding": ([nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), TTFS()], "only zeros are silence"),
    "batch": ([nn.Flatten(0)], r"1 \(Flatten\): \(2, 1, 8, 8\) to \(128,\) does not keep the batch"),
    "adaptive": ([nn.AdaptiveAvgPool2d(3), nn.Conv2d(1, 2, 1)], "windows are of several sizes, 8×8 to 3×3"),
    "linear-on-images": ([nn.Linear(8, 3), TTFS()], "flatten to"),
    "ends-in-pooling": ([nn.Conv2d(1, 2, 3), TTFS(), nn.MaxPool2d(2)], "ends in a pooling"),
}


@pytest.mark.parametrize("case", IMAGE_BAD)
def test_image_layers_that_cannot_be_mapped_are_named(case):
    layers, message = IMAGE_BAD[case]
    with pytest.raises(UnsupportedError, match=message):
        to_snn(nn.Sequential(TTFSEncoder(), *layers).eval(), torch.rand(2, 1, 8, 8))


def test_batch_norm_in_train_mode_and_broken_weights():
    with pytest.raises(UnsupportedError, match=r"2: batch normalisation in train mode.*model.eval\(\)"):
        to_snn(mlp().train(), torch.rand(2, 20))
    model = mlp().eval()
    with torch.no_grad():
        model[1].weight[2, 3] = math.nan
    with pytest.raises(InputError, match=r"1.weight has NaN"):
        to_snn(model, torch.rand(2, 20))
    with pytest.raises(UnsupportedError, match=r"torch.bfloat16; .*model.float\(\)"):
        to_snn(mlp().eval().bfloat16(), torch.rand(2, 20).bfloat16())
    with pytest.raises(InputError, match=r"does not run on the example \(2, 7\)"):
        to_snn(mlp().eval(), torch.rand(2, 7))


def test_bad_input_of_a_simulation():
    net = to_snn(mlp().eval(), torch.rand(1, 20))
    good = torch.rand(2, 20)
    for bad, message in (
        (torch.rand(2, 19), r"takes floating intensities \(B, 20\), got \(2, 19\)"),
        (good.long(), "floating"),
        (good * 3, r"intensities in \[0, 1\]"),
        (good - 0.5, r"intensities in \[0, 1\]"),
        (good * math.nan, "NaN"),
        ([1.0], "got list"),
    ):
        with pytest.raises(InputError, match=message):
            net.run(bad)
    with pytest.raises(ConfigError, match="simulators are event, clock"):
        net.run(good, simulator="analog")
    for early in (0, 33, 1.5, True):
        with pytest.raises(ConfigError, match="from 1 to the window, 32"):
            net.run(good, early_firing=early)
    with pytest.raises(InputError, match="a spike time is 0…31, or 255"):
        net.run(times=torch.full((2, 20), 40, dtype=torch.uint8))
    with pytest.raises(InputError, match="one of them"):
        net.run(good, times=torch.zeros(2, 20, dtype=torch.uint8))
    assert net.run(good[:0]).output.shape == (0, 10)


def test_a_grid_too_coarse_is_refused():
    model = nn.Sequential(
        TTFSEncoder(window=250, tau=12.0), nn.Linear(4, 4), TTFS(window=250, tau=12.0)
    ).eval()
    with pytest.raises(
        UnsupportedError, match=r"2: sums of up to .* leave .* bits for the weights in torch.float32.*float64"
    ):
        to_snn(model, torch.rand(1, 4), exact_grid=True)
    assert (
        to_snn(model.double(), torch.rand(1, 4).double())
        .verify(torch.rand(50, 4).double(), exact_grid=True)
        .equal
        == 1.0
    )
    thirds = nn.Sequential(TTFSEncoder(), nn.AvgPool2d(3), nn.Conv2d(1, 2, 1), TTFS()).eval()
    with pytest.raises(UnsupportedError, match="average over 9 cells"):
        to_snn(thirds, torch.rand(1, 1, 6, 6), exact_grid=True)


def test_a_converted_relu_network_round_trip():
    model = to_ttfs(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))).eval()
    x = torch.rand(64, 6)
    assert to_snn(model, x).verify(x, exact_grid=True).equal == 1.0
