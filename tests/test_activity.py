"""Recorded activity is what the layers really did, changes nothing, and leaves nothing behind."""

import contextlib
import json
import math
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import on_grid, spikes
from torch import nn

from snn_sparse_plugin import (
    InputError,
    SpikeTrain,
    Surrogate,
    record_activity,
    restore,
    sparse_mode,
    sparsify,
    unroll,
)
from snn_sparse_plugin.activity import Activity
from snn_sparse_plugin.core import tally

snn = pytest.importorskip("snntorch")
surrogate = pytest.importorskip("snntorch.surrogate")
utils = pytest.importorskip("snntorch.utils")

WINDOW = {"backprop_threshold": 0.2, "min_active": 0}
EXAMPLE = Path(__file__).parents[1] / "examples" / "tensorboard_activity.py"


def network(**options):
    options = {"beta": 0.9, "spike_grad": surrogate.fast_sigmoid(25), "init_hidden": True} | options
    net = nn.Sequential(
        nn.Linear(30, 20), snn.Leaky(**options), nn.Linear(20, 10), snn.Leaky(output=True, **options)
    )
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.copy_(on_grid(*layer.weight.shape))
            layer.bias.copy_(on_grid(*layer.bias.shape))
    return net


def stepped(net, x):
    """The step loop: -> spikes and distances to threshold of the first layer, spikes of the last, (T, B, N)."""
    utils.reset(net)
    found = []
    for step in x:
        first = net[1](net[0](step))
        distance = net[1].mem - net[1].threshold
        last, _ = net[3](net[2](first))
        found.append((first, distance, last))
    return [torch.stack(part).detach() for part in zip(*found, strict=True)]


def test_a_step_loop_records_every_step():
    net, x = network(), spikes(12, 4, 30, p=0.2)
    sparsify(net, fuse_time=False, **WINDOW)
    with record_activity(net) as log:
        first, distance, last = stepped(net, x)
    assert list(log) == ["1", "3"]
    assert [entry.call for entry in log["1"]] == list(range(12))
    assert {entry.steps for entry in log["1"]} == {1}
    assert [entry.rate for entry in log["1"]] == pytest.approx(first.mean((1, 2)).tolist())
    assert [entry.rate for entry in log["3"]] == pytest.approx(last.mean((1, 2)).tolist())
    near = (distance.abs() < 0.2).float()
    assert [entry.active for entry in log["1"]] == pytest.approx(near.mean((1, 2)).tolist())
    assert 0 < near.mean() < 1
    assert 0 < first.mean() < 1
    assert log.mean()["1"] == pytest.approx((first.mean().item(), near.mean().item()))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("events", [False, True])
def test_a_fused_call_records_what_the_loop_did(backend, events):
    net, x = network(), spikes(12, 4, 30, p=0.2)
    sparsify(net, backend=backend, fuse_time=False, **WINDOW)
    with record_activity(net) as loop:
        stepped(net, x)
    utils.reset(net)
    sparsify(net, backend=backend, **WINDOW)
    with record_activity(net) as log:
        unroll(net, x, events=events)
    for name in ("1", "3"):
        (entry,) = log[name]
        assert (entry.call, entry.steps) == (0, 12)
        assert log.mean()[name] == pytest.approx(loop.mean()[name])
        assert 0 < entry.active < 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("options", "grad", "expected"),
    [
        ({"backprop_threshold": None}, True, 1.0),
        ({"backprop_threshold": 1e-9, "min_active": 0.5}, True, 1.0),  # the guard
        (WINDOW, False, math.nan),
    ],
    ids=["exact", "guard", "no_grad"],
)
def test_active_is_the_share_that_passes_a_gradient(fused, options, grad, expected):
    net, x = network(), spikes(5, 4, 30, p=0.2)
    sparsify(net, fuse_time=fused, **options)
    with record_activity(net) as log, torch.set_grad_enabled(grad):
        unroll(net, x)
    assert len(log["1"]) == (1 if fused else 5)
    assert all(e.active == pytest.approx(expected, nan_ok=True) for e in log["1"])
    assert log.mean()["1"] == pytest.approx((log.mean()["1"][0], expected), nan_ok=True)


def test_a_custom_surrogate_is_recorded():
    inner = Surrogate("fast_sigmoid", (25.0,))
    neuron = snn.Leaky(beta=0.9, spike_grad=lambda x: inner(x), init_hidden=True)
    sparsify(neuron, **WINDOW)
    with record_activity(neuron) as log:
        neuron(torch.tensor([[0.0, 0.9, 1.1, 3.0]], requires_grad=True))
    assert log[""] == [Activity(0, 0.5, 0.5, 1)]


def test_norse_fused_and_by_step():
    norse = pytest.importorskip("norse.torch")
    net = norse.SequentialState(nn.Linear(30, 20), norse.LIF(), nn.Linear(20, 5), norse.LI())
    cell = norse.LIFCell()
    with sparse_mode(**WINDOW):
        with record_activity(net) as log:
            net(spikes(9, 4, 30, p=0.5).requires_grad_())
        with record_activity(cell) as steps:
            cell(torch.rand(4, 6, requires_grad=True))
    assert [entry.steps for entry in log["1"]] == [9]
    assert [entry.steps for entry in steps[""]] == [1]
    # a readout neither spikes nor has a window
    assert log["3"] == []
    assert list(log.mean()) == ["1"]


def test_recording_changes_nothing_and_keeps_fusing():
    net, x = network(), spikes(12, 4, 30, p=0.2)
    report = sparsify(net, **WINDOW)

    def gradients():
        utils.reset(net)
        net.zero_grad()
        unroll(net, x).spikes.sum().backward()
        return [p.grad.clone() for p in net.parameters()]

    plain = gradients()
    with record_activity(net):
        recorded = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    assert all(runs.keys() <= {"fused", "backward"} for runs in report.runs().values())


def test_nothing_is_left_behind():
    net, x = network(), spikes(3, 2, 30)
    sparsify(net)
    unroll(net, x)  # leaves snnTorch's own `reset`
    utils.reset(net)
    attributes = [set(vars(module)) for module in net.modules()]
    with contextlib.suppress(KeyError), record_activity(net) as log:
        unroll(net, x)
        raise KeyError
    assert tally.watchers.get() is None
    utils.reset(net)
    unroll(net, x)
    assert len(log["1"]) == 1
    assert attributes == [set(vars(module)) for module in net.modules()]


def test_blocks_nest():
    net, other, x = network(), network(), spikes(3, 2, 30)
    with sparse_mode(), record_activity(net) as outer:
        unroll(net, x)
        with record_activity(net) as inner, record_activity(other) as others:
            unroll(net, x)
            unroll(other, x)
        unroll(net, x)
    assert [len(log["1"]) for log in (outer, inner, others)] == [3, 1, 1]


def test_each_thread_records_its_own():
    net, other, x = network(), network(), spikes(3, 2, 30)
    sparsify(net), sparsify(other)
    logs = []

    def work():
        unroll(net, x)  # recorded by the main thread only if it ran there
        with record_activity(other) as log:
            unroll(other, x)
        logs.append(log)

    with record_activity(net) as log:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not log["1"]
        unroll(other, x)
    assert len(logs[0]["1"]) == 1


def test_layers_that_are_not_sparse_record_nothing():
    net, x = network(), spikes(3, 2, 30)
    sparsify(net)
    restore(net)
    with record_activity(net) as log:
        stepped(net, x)
    assert dict(log) == {"1": [], "3": []}
    assert log.mean() == {}


def test_clear_starts_again():
    net, x = network(), spikes(3, 2, 30)
    sparsify(net)
    with record_activity(net) as log:
        unroll(net, x)
        log.clear()
        assert log.mean() == {}
        unroll(net, x)
    assert [entry.call for entry in log["1"]] == [0]


@pytest.mark.parametrize(("model", "words"), [(nn.Linear(2, 2), "no spiking neurons"), ("net", "got str")])
def test_a_model_without_neurons_is_an_error(model, words):
    with pytest.raises(InputError, match=words), record_activity(model):
        pass


def test_report_as_dict_is_json():
    net = nn.Sequential(*network(), snn.SLSTM(10, 10))
    report = sparsify(net, **WINDOW)
    unroll(net[:4], spikes(3, 2, 30)).spikes.sum().backward()
    found = json.loads(json.dumps(report.as_dict()))
    assert found["config"]["backprop_threshold"] == 0.2
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["1", "3", "4"]
    assert rows["1"] == {
        "name": "1",
        "kind": "Leaky",
        "status": "fused",
        "reason": "",
        "ran": {"fused": 1, "backward": 1},
    }
    assert rows["4"]["status"] == "masked"
    assert rows["4"]["reason"]


# --- pictures ---


def test_plot_activity(tmp_path):
    plot = pytest.importorskip("snn_sparse_plugin.plot")
    log = {
        f"lif{k}": [Activity(0, 0.01 * k, 0.1, 5), Activity(1, 0.02 * k, math.nan, 5)] for k in range(7)
    } | {"silent": []}
    figure = plot.activity(log, tmp_path / "activity.png")
    assert (tmp_path / "activity.png").read_bytes().startswith(b"\x89PNG")
    rates, active = figure.axes
    assert [line.get_label() for line in rates.lines] == [f"lif{k}" for k in range(7)]
    assert list(rates.lines[3].get_ydata()) == pytest.approx([0.03, 0.06])
    assert active.lines[0].get_ydata()[0] == 0.1
    looks = {(line.get_color(), line.get_linestyle()) for line in rates.lines}
    assert len(looks) == 7
    with pytest.raises(InputError, match="log is empty"):
        plot.activity({"silent": []})


@pytest.mark.parametrize("form", ["dense", "train", "coo"])
def test_plot_raster(tmp_path, form):
    plot = pytest.importorskip("snn_sparse_plugin.plot")
    x = spikes(11, 3, 2, 4, p=0.3)
    given = {"dense": x, "train": SpikeTrain.from_dense(x), "coo": x.to_sparse_coo()}[form]
    figure = plot.raster(given, sample=1, path=tmp_path / "raster.svg")
    assert "<svg" in (tmp_path / "raster.svg").read_text()
    drawn = {(int(t), int(n)) for t, n in figure.axes[0].collections[0].get_offsets()}
    assert drawn == {tuple(at) for at in x[:, 1].flatten(1).nonzero().tolist()}
    assert drawn


def test_plot_raster_of_silence_and_of_bad_input():
    plot = pytest.importorskip("snn_sparse_plugin.plot")
    silence = torch.zeros(4, 2, 3)
    for quiet in (silence, SpikeTrain.from_dense(silence)):
        assert "0 spikes" in plot.raster(quiet).axes[0].get_title(loc="left")
    with pytest.raises(InputError, match="no sample 2 in a batch of 2"):
        plot.raster(silence, sample=2)
    with pytest.raises(InputError, match=r"\(T, B, N...\), got \(4, 2\)"):
        plot.raster(torch.zeros(4, 2))
    with pytest.raises(InputError, match="got list"):
        plot.raster([1.0])


def test_plots_without_matplotlib_say_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import snn_sparse_plugin\n"
        "try:\n    snn_sparse_plugin.plot\n"
        "except snn_sparse_plugin.MissingDependencyError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install matplotlib" in done.stdout


# --- the example ---


def test_tensorboard_example(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--logdir", str(tmp_path), "--steps", "3"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss",
        *(f"{what}/{name}" for what in ("spike rate", "active") for name in "13"),
    }
    assert [point.step for point in events.Scalars("spike rate/1")] == [0, 1, 2]
    assert 0 < events.Scalars("spike rate/1")[0].value < 1


def test_tensorboard_example_without_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit, match="pip install tensorboard"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
