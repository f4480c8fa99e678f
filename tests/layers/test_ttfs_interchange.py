"""Single spikes to and from snnTorch, Norse, SpikeTrain and files; reports, energy, pictures, the command line."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from snn_sparse_plugin import ConfigError, InputError, SpikeTrain, UnsupportedError
from snn_sparse_plugin.interfaces.cli import app
from snn_sparse_plugin.layers.ttfs import (
    SILENT,
    TTFS,
    EnergyReference,
    TTFSEncoder,
    TTFSNetwork,
    kernel_parameters,
    to_snn,
)
from snn_sparse_plugin.layers.ttfs.interchange import (
    decode_times,
    dense_spikes,
    first_spike_times,
    load_spike_times,
    save_spike_times,
    spike_view,
    times_from_norse,
    to_nir,
    to_spike_train,
)
from snn_sparse_plugin.layers.ttfs.report import REFERENCES, energy

WINDOW = 12


def random_times(*shape):
    times = torch.randint(0, WINDOW, shape)
    return torch.where(torch.rand(shape) < 0.4, SILENT, times).to(torch.uint8)


def network(n=64, classes=10):
    model = nn.Sequential(TTFSEncoder(), nn.Linear(n, 20), TTFS(), nn.Linear(20, classes)).eval()
    return model, to_snn(model, torch.rand(1, n))


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 4, 5), (0, 4)], ids=str)
def test_times_dense_and_train_round_trip(shape):
    times = random_times(*shape)
    dense = dense_spikes(times, WINDOW)
    assert dense.shape == (WINDOW, *shape)
    assert dense.sum(0).max() <= 1 if dense.numel() else True
    assert torch.equal(first_spike_times(dense), times)
    train = to_spike_train(times, WINDOW)
    assert torch.equal(train.to_dense(), dense)
    SpikeTrain(train.indptr, train.indices, train.shape)  # its own checks
    assert torch.equal(first_spike_times(train), times)
    if dense.numel():
        assert torch.equal(first_spike_times(dense.to_sparse()), times)


def test_only_the_first_of_several_spikes_counts():
    spikes = (torch.rand(WINDOW, 4, 9) < 0.3).float()
    times = first_spike_times(spikes)
    for b in range(4):
        for n in range(9):
            fired = spikes[:, b, n].nonzero().flatten().tolist()
            assert times[b, n] == (fired[0] if fired else SILENT)


def test_from_snntorch_latency():
    spikegen = pytest.importorskip("snntorch.spikegen")
    x = torch.rand(5, 11)
    spikes = spikegen.latency(x, num_steps=WINDOW, tau=3, threshold=0.1, clip=True, normalize=True)
    times = first_spike_times(spikes)
    assert torch.equal(times == SILENT, spikes.sum(0) == 0)
    assert torch.equal(dense_spikes(times, WINDOW), spikes)
    _, net = network(11, 4)
    assert net.run(times=times).spikes["input"].tolist() == spikes.sum((0, 2)).tolist()


def test_snntorchs_first_spike_loss_trains_a_ttfs_network():
    functional = pytest.importorskip("snntorch.functional")
    layer = TTFS(window=16, tau=6.0)
    model = nn.Linear(8, 3)
    x, y = torch.rand(60, 8), torch.randint(3, (60,))
    x[torch.arange(60), y] += 0.7
    loss_of = functional.ce_temporal_loss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        spikes = spike_view(model(x), layer)
        assert spikes.shape == (16, 60, 3)
        loss = loss_of(spikes, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    times = first_spike_times(spike_view(model(x), layer)).float()
    assert (times.argmin(1) == y).float().mean() > 0.7


def test_spike_view_is_the_layers_spikes():
    layer = TTFS(window=16, tau=6.0, t_d=0.5)
    x = torch.randn(4, 50)
    from snn_sparse_plugin.ops.ttfs.reference import encode

    leaf = x.clone().requires_grad_()
    view = spike_view(leaf, layer)
    times = first_spike_times(view)
    assert torch.equal(times, encode(x, layer.table()))
    g = torch.randn_like(view)
    (d_x,) = torch.autograd.grad(view, leaf, g)
    at = times.long().clamp(max=15)
    assert torch.equal(d_x, g.gather(0, at.unsqueeze(0))[0])


def test_norse_encoder_and_decoder():
    pytest.importorskip("norse")
    import norse.torch as norse

    times = random_times(3, 7)
    dense = dense_spikes(times, WINDOW)
    assert torch.equal(norse.SpikeLatencyEncoder()(dense), dense)
    many = (torch.rand(WINDOW, 3, 7) < 0.4).float()
    assert torch.equal(norse.SpikeLatencyEncoder()(many), dense_spikes(first_spike_times(many), WINDOW))
    for seconds in (None, 1e-3):
        decoder = norse.SpikesToTimesDecoder(
            torch.tensor(1), convert_indices_to_times=seconds is not None, dt=seconds or 1.0
        )
        assert torch.equal(times_from_norse(decoder(dense), WINDOW, seconds), times)


def test_files_of_spike_times(tmp_path):
    _, net = network()
    x = torch.rand(6, 64)
    save_spike_times(net, x, tmp_path / "times.npz")
    found = load_spike_times(tmp_path / "times.npz")
    expected = net.run(x, record=True)
    assert set(found) == {"input", "2"}
    for name, times in expected.times.items():
        assert torch.equal(found[name], times)
    values = decode_times(net, "2", found["2"])
    torch.testing.assert_close(values @ net.stages[1].weight.t() + net.stages[1].bias, expected.output)
    with pytest.raises(InputError, match="no spiking layer '3'"):
        decode_times(net, "3", found["2"])
    whole = (tmp_path / "times.npz").read_bytes()
    for name, content in {"cut.npz": whole[:-200], "empty.npz": b"", "head.npz": b"PK\x03\x04"}.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("none.npz", "cut.npz", "empty.npz", "head.npz", "array.npy"):
        with pytest.raises(InputError, match="cannot be read"):
            load_spike_times(tmp_path / name)


def test_nir_says_what_it_cannot_express(tmp_path):
    nir = pytest.importorskip("nir")
    model = nn.Sequential(
        TTFSEncoder(), nn.Conv2d(1, 2, 3), TTFS(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(18, 4)
    ).eval()
    net = to_snn(model, torch.rand(1, 1, 8, 8))
    with pytest.raises(UnsupportedError, match="no neuron with a falling threshold"):
        to_nir(net)
    graph = to_nir(net, neurons="threshold")
    nir.write(str(tmp_path / "net.nir"), graph)
    again = nir.read(str(tmp_path / "net.nir"))
    assert set(again.nodes) == set(graph.nodes)
    assert (again.nodes["2"].weight == net.stages[0].weight.numpy()).all()
    assert again.nodes["2_neurons"].threshold.max() == pytest.approx(model[2].x_m)
    pooled = nn.Sequential(
        TTFSEncoder(), nn.Conv2d(1, 2, 3), TTFS(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 4)
    )
    with pytest.raises(UnsupportedError, match="no max pooling, as before or behind 5"):
        to_nir(to_snn(pooled.eval(), torch.rand(1, 1, 8, 8)), neurons="threshold")


def test_bad_times_and_spikes():
    with pytest.raises(InputError, match="uint8"):
        dense_spikes(torch.zeros(2, 3), 4)
    with pytest.raises(InputError, match="step 9 lies outside a window of 4"):
        to_spike_train(torch.tensor([[9, 255]], dtype=torch.uint8), 4)
    with pytest.raises(InputError, match="graded"):
        first_spike_times(torch.full((3, 2, 2), 0.5))
    with pytest.raises(InputError, match=r"at most 255 steps, got torch.float32 \(300, 1, 1\)"):
        first_spike_times(torch.zeros(300, 1, 1))
    with pytest.raises(InputError, match="1 to 255 steps, got 300"):  # times above 255 do not fit a byte
        times_from_norse(torch.full((1, 2, 3), 280.0), 300)
    with pytest.raises(InputError, match=r"\(1, B, N…\), got torch.float32 \(2, 3\)"):
        times_from_norse(torch.zeros(2, 3), 32)
    with pytest.raises(InputError, match="got list"):
        dense_spikes([[1]], 4)
    with pytest.raises(InputError, match=r"\(B, N…\), got torch.int64 \(2, 3\)"):
        spike_view(torch.zeros(2, 3, dtype=torch.int64), TTFS())


def test_energy_is_the_weighted_sum():
    assert energy(0.193e6, 512, REFERENCES["tsc-cifar10"]) == pytest.approx({"TrueNorth": 1, "SpiNNaker": 1})
    found = energy(50, 20, EnergyReference(100, 80))
    assert found == pytest.approx(
        {"TrueNorth": 0.5 * 0.4 + 0.25 * 0.6, "SpiNNaker": 0.5 * 0.64 + 0.25 * 0.36}
    )
    with pytest.raises(ConfigError, match="> 0"):
        energy(1, 1, EnergyReference(0, 5))


# VGG-16, T = 32: spikes and steps published by Park & Yoon, arXiv 2106.02568, and the energies of the formula
ENERGIES = {
    "TSC, CIFAR-10": ("tsc-cifar10", 193e3, 512, 1.0, 1.0),
    "TSC, CIFAR-100": ("tsc-cifar100", 170e3, 512, 1.0, 1.0),
    "+TR, CIFAR-10": ("tsc-cifar10", 73.1e3, 544, 0.789, 0.625),
    "+TB, CIFAR-10": ("tsc-cifar10", 67.4e3, 544, 0.777, 0.606),
    "+TB of more weight, CIFAR-10": ("tsc-cifar10", 49.0e3, 544, 0.739, 0.545),
}


@pytest.mark.parametrize("network", ENERGIES)
def test_energy_of_published_networks(network):
    reference, spikes, steps, truenorth, spinnaker = ENERGIES[network]
    found = energy(spikes, steps, REFERENCES[reference])
    assert found == pytest.approx({"TrueNorth": truenorth, "SpiNNaker": spinnaker}, abs=5e-4)


def test_report_counts():
    model, net = network()
    x, y = torch.rand(30, 64), torch.randint(10, (30,))
    found = net.report(x, labels=y, batch_size=7)
    run = net.run(x, record=True)
    hidden = (run.times["2"] != SILENT).sum().item() / 30
    assert found.hidden_spikes == pytest.approx(hidden)
    assert found.spikes == pytest.approx(hidden + (run.times["input"] != SILENT).sum().item() / 30)
    assert found.latency == 64
    assert found.macs == 64 * 20 + 20 * 10
    inputs = (run.times["input"] != SILENT).sum().item() / 30
    assert found.synops == pytest.approx(inputs * 20 + hidden * 10)
    assert found.accuracy == pytest.approx((model(x).argmax(1) == y).float().mean().item())
    rows = {row.name: row for row in found.layers}
    assert rows["2"].sparsity == pytest.approx(hidden / 20)
    assert rows["2"].rate == pytest.approx(hidden / 20 / 32)
    assert rows["readout"].spikes == 0
    assert json.loads(json.dumps(found.as_dict()))["samples"] == 30
    early = net.report(x, early_firing=8)
    assert early.latency == 8 + 32
    assert 0 <= early.agreement <= 1
    assert "same class as without early firing" in str(early)
    with pytest.raises(ConfigError, match="tsc-cifar10"):
        net.report(x, reference="loihi")
    with pytest.raises(InputError, match=r"\(30,\), one for each sample, got \(4,\)"):
        net.report(x, labels=y[:4])


def test_silent_layers_are_named():
    model = nn.Sequential(TTFSEncoder(), nn.Linear(4, 5), TTFS(), nn.Linear(5, 2)).eval()
    with torch.no_grad():
        model[1].bias.fill_(-50)
    found = to_snn(model, torch.rand(1, 4)).report(torch.rand(8, 4))
    assert found.silent == ["2"]
    assert "silent for every sample: 2" in str(found)
    assert all(math.isfinite(v) for v in found.energy.values())


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    from snn_sparse_plugin import plot

    model, net = network()
    x = torch.rand(5, 64)
    figure = plot.ttfs_spike_times(net.run(x, record=True).times, path=tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")
    assert figure.axes[1].get_title(loc="left").startswith("2: ")
    model.train()
    figure = plot.ttfs_preactivations(model, x)
    assert model.training
    assert figure.axes[0].get_title(loc="left").endswith("% pruned")
    lines = sorted(line.get_xdata()[0] for line in figure.axes[0].lines)
    assert lines == pytest.approx([model[2].x_m, model[2].x_M])
    lines = plot.ttfs_kernels({"2": [(10.0, 0.0), (9.0, 0.1)]}).axes[0].lines
    assert lines[0].get_ydata().tolist() == [10.0, 9.0]
    assert len(plot.ttfs_kernels([kernel_parameters(model)] * 3).axes[1].lines[0].get_ydata()) == 3
    with pytest.raises(InputError, match="record=True"):
        plot.ttfs_spike_times({})
    with pytest.raises(InputError, match="no TTFS layer"):
        plot.ttfs_preactivations(nn.Linear(64, 2), x)
    with pytest.raises(InputError, match="1 to 255 steps, got 300"):
        plot.ttfs_spike_times(net.run(x, record=True).times, window=300)
    with pytest.raises(InputError, match="0: the pre-activations have NaN"):
        plot.ttfs_preactivations(nn.Sequential(TTFS()), torch.tensor([[0.5, math.nan]]))
    with pytest.raises(InputError, match="different layers"):
        plot.ttfs_kernels([{"a": (1.0, 0.0)}, {"b": (1.0, 0.0)}])
    with pytest.raises(InputError, match="history is empty"):
        plot.ttfs_kernels({})
    with pytest.raises(InputError, match="history is empty"):
        plot.ttfs_kernels([])


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command_line(tmp_path):
    pytest.importorskip("sklearn")
    _, net = network()
    net.save(tmp_path / "net.pt")
    found = invoke("ttfs", "report", tmp_path / "net.pt", "--samples", 20, "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["samples"] == 20
    assert "synaptic operations" in invoke("ttfs", "report", tmp_path / "net.pt", "--early-firing", 4).stdout
    found = invoke("ttfs", "verify", tmp_path / "net.pt", "--exact-grid", "--samples", 30)
    assert found.exit_code == 0
    assert found.stdout.startswith("100.00000 % of 600 spike times equal")
    _, other = network(n=5)
    other.save(tmp_path / "other.pt")
    found = invoke("ttfs", "report", tmp_path / "other.pt")
    assert found.exit_code == 2
    assert "have 64 pixels, the network" in found.output
    assert invoke("ttfs", "report", tmp_path / "none.pt").exit_code == 1
    assert invoke("ttfs", "report", tmp_path / "net.pt", "--spikes", 3).exit_code == 2
    assert isinstance(TTFSNetwork.load(tmp_path / "net.pt"), TTFSNetwork)


def test_ablation_wants_a_device_that_is_here():
    result = CliRunner().invoke(app, ["ttfs", "ablation", "--device", "cuda:99"])
    assert result.exit_code == 2
    assert "'cuda:99' is not available" in result.output


def test_ablation_command():
    pytest.importorskip("sklearn")
    before = torch.get_num_threads()
    options = [
        "--threads",
        1,
        "--epochs",
        2,
        "--samples",
        129,
        "--seeds",
        2,
        "--tb",
        0.5,
        "--form",
        "gaussian",
        "--shift",
        1,
        "--weight-decay",
        0.01,
        "--json",
    ]
    found = invoke("ttfs", "ablation", *options)
    assert found.exit_code == 0, found.output
    assert torch.get_num_threads() == before
    rows = json.loads(found.stdout)
    assert [r["recipe"] for r in rows] == 2 * ["ReLU", "SM", "+SR", "+TR", "+TB 0.5"]
    assert rows[0]["latency"] == 0
    assert rows[1]["latency"] == 96
    assert all(0 <= r["accuracy"] <= 1 for r in rows)
    assert rows[4]["hidden_spikes"] < rows[3]["hidden_spikes"]
    assert all(
        (360 * r["accuracy"]) == pytest.approx(round(360 * r["accuracy"])) for r in rows
    )  # all test images
