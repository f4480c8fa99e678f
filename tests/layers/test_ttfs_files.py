"""No file and no edit by hand makes a simulator index outside its buffers; files of networks are always whole."""

import errno
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from snn_sparse_plugin import InputError, UnsupportedError
from snn_sparse_plugin.core.config import SparseConfig, use_config
from snn_sparse_plugin.core.errors import FileError
from snn_sparse_plugin.layers.ttfs import TTFS, TTFSEncoder, TTFSNetwork, TTFSReadout, to_snn
from snn_sparse_plugin.layers.ttfs.events import simulate
from snn_sparse_plugin.layers.ttfs.interchange import decode_times, load_spike_times, save_spike_times
from snn_sparse_plugin.layers.ttfs.stages import Pool

SIMULATORS = ("clock", "event")


def dense():
    layers = [TTFSEncoder(window=16), nn.Linear(12, 9), TTFS(window=16), TTFSReadout(9, 5)]
    return to_snn(nn.Sequential(*layers).eval(), torch.rand(1, 12))


def image():
    layers = [TTFSEncoder(window=16), nn.MaxPool2d(2), nn.Conv2d(2, 4, 3, 2, 1, groups=2), TTFS(window=12)]
    layers += [
        nn.MaxPool2d(2, 1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 3),
        TTFS(window=9),
        TTFSReadout(3, 2),
    ]
    return to_snn(nn.Sequential(*layers).eval(), torch.rand(1, 2, 14, 13))


NETWORKS = {"dense": dense, "image": image}


def pool(**changes):
    whole = {
        "kind": "max",
        "kernel": (2, 2),
        "stride": (2, 2),
        "padding": (0, 0),
        "dilation": (1, 1),
        "ceil": False,
    }
    return whole | changes


def first(**changes):
    return lambda d: d["stages"][0].update(changes)


def last(**changes):
    return lambda d: d["stages"][-1].update(changes)


def of_weight(change):
    return lambda d: d["stages"][0].update(weight=change(d["stages"][0]["weight"]))


# what is changed in the file, by network: sizes that disagree, values out of range, other kinds
DENSE = {
    "a long table": first(table=torch.rand(2, 100_000)),
    "a table of 256 steps": first(table=torch.linspace(1, 0.1, 256).expand(2, -1).clone()),
    "a table without steps": first(table=torch.ones(2, 0)),
    "a table of one step": first(table=torch.ones(2, 1)),
    "a table of one row": first(table=torch.ones(1, 16)),
    "an integer table": first(table=torch.ones(2, 16, dtype=torch.int64)),
    "a rising table": first(table=torch.linspace(0.1, 1, 16).expand(2, -1).clone()),
    "a table of NaN": first(table=torch.full((2, 16), torch.nan)),
    "a table of zeros": first(table=torch.zeros(2, 16)),
    "a large input": lambda d: (d["stages"][0].update(in_shape=(100_000,)), d.update(input_shape=(100_000,))),
    "a large input of the network": lambda d: d.update(input_shape=(100_000,)),
    "a large output": first(out_shape=(100_000,)),
    "an output of no neurons": first(out_shape=(0,)),
    "a negative output": first(out_shape=(-9,)),
    "an output that is a number": first(out_shape=9),
    "a huge output": first(out_shape=(2**62, 2)),
    "a small weight": of_weight(lambda w: w[:, :2].clone()),
    "a weight of fewer neurons": of_weight(lambda w: w[:3].clone()),
    "an empty weight": of_weight(lambda w: w[:0].clone()),
    "a weight of another rank": of_weight(lambda w: w.flatten()),
    "a weight of three dimensions": of_weight(lambda w: w.unsqueeze(-1)),
    "a weight in double": of_weight(lambda w: w.double()),
    "an integer weight": of_weight(lambda w: w.long()),
    "a sparse weight": of_weight(lambda w: w.to_sparse()),
    "a weight that is none": of_weight(lambda w: None),
    "a weight of NaN": of_weight(lambda w: torch.full_like(w, torch.nan)),
    "a weight with an infinity": of_weight(lambda w: w.index_fill(0, torch.tensor([2]), torch.inf)),
    "a weight that repeats itself": of_weight(lambda w: torch.zeros(1).expand(9, 12)),
    "a short bias": first(bias=torch.zeros(1)),
    "a bias of another dtype": first(bias=torch.zeros(9, dtype=torch.float64)),
    "a bias that is a number": first(bias=0.0),
    "an encoder of three rows": lambda d: d.update(encoder=torch.ones(3, 16)),
    "an encoder of 300 steps": lambda d: d.update(encoder=torch.ones(2, 300)),
    "an encoder of other dtype": lambda d: d.update(encoder=d["encoder"].double()),
    "an infinite encoder": lambda d: d.update(encoder=torch.full((2, 16), torch.inf)),
    "no stages": lambda d: d.update(stages=[]),
    "stages in another order": lambda d: d["stages"].reverse(),
    "the first stage twice": lambda d: d["stages"].insert(0, dict(d["stages"][0])),
    "two layers of one name": last(name="2"),
    "a layer called input": first(name="input"),
    "a name that is none": first(name=3),
    "a readout before the end": first(table=None),
    "max pooling of neurons in a row": first(before=[pool()]),
    "average pooling of neurons in a row": first(before=[pool(kind="avg")]),
    "pooling behind a dense layer": first(after=[pool()]),
    "a stride of zero": first(stride=(0, 1)),
    "a dilation of one number": first(dilation=(1,)),
    "a padding that is text": first(padding="same"),
}
IMAGE = {
    "no groups": first(groups=0),
    "negative groups": first(groups=-2),
    "groups that do not divide": first(groups=3),
    "one group": first(groups=1),
    "groups that are true": first(groups=True),
    "a stride of zero": first(stride=(0, 2)),
    "another stride": first(stride=(1, 2)),
    "a negative padding": first(padding=(-1, 1)),
    "a huge padding": first(padding=(2**62, 1)),
    "an image that is nearly all padding": first(
        stride=(1, 1), padding=(20_000, 20_000), out_shape=(4, 40_005, 40_004)
    ),
    "another padding": first(padding=(0, 1)),
    "a dilation beyond the image": first(dilation=(9, 1)),
    "a dilation of fractions": first(dilation=(1.5, 1)),
    "another image": first(in_shape=(2, 13, 14)),
    "more channels": first(in_shape=(4, 14, 13)),
    "a flat image": first(in_shape=(2 * 14 * 13,)),
    "a larger output": first(out_shape=(4, 400, 400)),
    "a flat output": first(out_shape=(64,)),
    "a larger kernel": of_weight(lambda w: w.repeat(1, 1, 4, 4)),
    "an empty kernel": of_weight(lambda w: w[:, :, :0]),
    "pooling by zero": first(before=[pool(kernel=(0, 2))]),
    "pooling without a stride": first(before=[pool(stride=(0, 0))]),
    "pooling padded by more than half": first(before=[pool(padding=(2, 2))]),
    "pooling of another kind": first(before=[pool(kind="min")]),
    "average before max": first(before=[pool(kind="avg"), pool()]),
    "averages that overlap": first(before=[pool(kind="avg", stride=(1, 1))]),
    "two averages": first(before=[pool(kind="avg"), pool(kind="avg")]),
    "an average after the neurons": first(after=[pool(kind="avg")]),
    "pooling larger than the image": first(before=[pool(kernel=(99, 99))]),
    "no pooling any more": first(before=[]),
    "flattened where it is not": first(flatten_after=1),
    "pooling beyond a layer's size": first(after=[pool(kernel=(50, 2))]),
}
CASES = [(net, what) for net, changes in (("dense", DENSE), ("image", IMAGE)) for what in changes]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file of each network, and what is in it."""
    folder, found = tmp_path_factory.mktemp("networks"), {}
    for name, make in NETWORKS.items():
        make().save(folder / f"{name}.pt")
        found[name] = folder / f"{name}.pt"
    return found


@pytest.mark.parametrize(("name", "what"), CASES, ids=["-".join(case) for case in CASES])
def test_a_file_whose_parts_do_not_fit_is_refused_by_name(tmp_path, saved, name, what):
    data = torch.load(saved[name], weights_only=True)
    {"dense": DENSE, "image": IMAGE}[name][what](data)
    torch.save(data, tmp_path / "net.pt")
    with pytest.raises(InputError) as error:
        TTFSNetwork.load(tmp_path / "net.pt")
    assert "net.pt" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_files_are_read_and_run_as_before(saved, name):
    net, again = NETWORKS[name](), TTFSNetwork.load(saved[name])
    assert repr(again) == repr(net)
    x = torch.rand(3, *net.input_shape)
    for early in (None, 4):
        clock, event = (again.run(x, simulator=s, early_firing=early, record=True) for s in SIMULATORS)
        assert all((clock.times[k] == event.times[k]).float().mean() > 0.99 for k in clock.times)


def by_hand(net, what):
    stage = net.stages[0]
    changes = {
        "table": {"table": torch.rand(2, 300)},
        "bias": {"bias": torch.zeros(2)},
        "weight": {"weight": stage.weight[:, :1].clone()},
        "rows": {"weight": stage.weight[:1].clone()},
        "in_shape": {"in_shape": (5,)},
        "out_shape": {"out_shape": (10**6,)},
        "stride": {"stride": (0, 0)},
        "groups": {"groups": 3},
        "pool": {"before": [Pool("avg", (2, 3), (2, 3))]},
        "double": {"bias": torch.zeros(len(stage.weight), dtype=torch.float64)},
    }
    return replace(stage, **changes[what])


CHANGES = ["table", "bias", "weight", "rows", "in_shape", "out_shape", "stride", "pool", "double"]


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("simulator", SIMULATORS)
@pytest.mark.parametrize("what", [*CHANGES, "groups"])
def test_a_network_changed_by_hand_is_checked_before_it_runs(what, simulator, backend):
    net = dense() if what != "groups" else image()
    times = net.encode(torch.rand(2, *net.input_shape))
    net.stages[0] = by_hand(net, what)
    with use_config(SparseConfig(backend=backend)), pytest.raises(InputError, match="layer"):
        net.run(times=times, simulator=simulator)


@pytest.mark.parametrize("what", CHANGES)
def test_the_event_simulator_checks_what_it_is_given(what):
    net = dense()
    times = net.encode(torch.rand(2, 12))
    stage = net.stages[0]
    assert simulate(stage, times, net.encoder[1], 16).u.shape == (2, 9)
    with pytest.raises(InputError):
        simulate(by_hand(net, what), times, net.encoder[1], 16)
    for wrong in (times[:, :5], times.int(), times[0], times.repeat(1, 2)):
        with pytest.raises(InputError):
            simulate(stage, wrong, net.encoder[1], 16)
    for values in (torch.ones(300), torch.ones(0), torch.ones(2, 16)):
        with pytest.raises(InputError):
            simulate(stage, times, values, 16)


def test_networks_without_stages_and_in_half_precision_say_so():
    net = dense()
    half = net.to(torch.float16)
    with pytest.raises(InputError, match='simulator="clock"'):
        half.run(torch.rand(2, 12))
    net.stages.clear()
    with pytest.raises(InputError, match="one stage or more"):
        net.run(torch.rand(2, 12))


@pytest.mark.parametrize("simulator", SIMULATORS)
@pytest.mark.parametrize("size", range(1, 9))
def test_shapes_behind_every_max_pooling_are_torchs(size, simulator):
    torch.manual_seed(size)
    for kernel in (1, 2, 3):
        for stride in (1, 2, 3):
            for padding in range(kernel // 2 + 1):
                for dilation in (1, 3):
                    for ceil in (False, True):
                        pooling = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil)
                        x = torch.rand(2, 1, size, size)
                        try:
                            pooled = pooling(x)
                        except RuntimeError:
                            continue
                        if not torch.isfinite(pooled).all():  # a window in the padding alone
                            continue
                        features = pooled.numel() // 2
                        body = nn.Sequential(
                            TTFSEncoder(window=8), pooling, nn.Flatten(), nn.Linear(features, 2)
                        )
                        net = to_snn(body.eval(), x)
                        torch.testing.assert_close(net.run(x, simulator=simulator).output, body(x))


@pytest.mark.parametrize("simulator", SIMULATORS)
def test_a_window_that_lies_in_the_padding_alone_passes_no_spike(simulator):
    layers = [TTFSEncoder(window=8), nn.MaxPool2d(2, padding=1, dilation=3), nn.Flatten(), nn.Linear(1, 2)]
    net = to_snn(nn.Sequential(*layers).eval(), torch.rand(1, 1, 2, 2))
    run = net.run(torch.ones(3, 1, 2, 2), simulator=simulator)
    assert torch.equal(run.output, net.stages[0].bias.expand(3, 2))


@pytest.mark.parametrize("pooling", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AvgPool2d((1, 3))])
@pytest.mark.parametrize("simulator", SIMULATORS)
def test_images_without_a_channel_are_pooled_as_torch_pools_them(pooling, simulator):
    x = torch.rand(3, 6, 7)
    layers = [TTFSEncoder(window=8), pooling, nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(nn.Sequential(*layers)(x).shape[1], 2)).eval()
    net = to_snn(model, x)
    torch.testing.assert_close(net.run(x, simulator=simulator).output, model(x))


def test_numbers_that_no_grid_holds_are_named():
    net = dense().to(torch.float64)
    net.encoder = torch.logspace(0, -308, 16, dtype=torch.float64).expand(2, -1).clone()
    with pytest.raises(UnsupportedError, match="2: its sums are too large, or its values too small"):
        net.on_grid()


# --- written whole ---


def test_a_full_disk_leaves_the_old_network(tmp_path, monkeypatch, saved):
    path = tmp_path / "net.pt"
    path.write_bytes(saved["dense"].read_bytes())

    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_room)
    for write in (
        lambda: image().save(path),
        lambda: save_spike_times(dense(), torch.rand(2, 12), tmp_path / "t.npz"),
    ):
        with pytest.raises(FileError, match="No space left"):
            write()
    assert path.read_bytes() == saved["dense"].read_bytes()
    assert list(tmp_path.iterdir()) == [path]


# --- spike times ---


@pytest.mark.parametrize(
    "change",
    [
        {"times/2": np.zeros((6, 9))},
        {"times/2": np.zeros((6, 9), np.int64)},
        {"times/2": np.zeros(6, np.uint8)},
        {"times/2": np.zeros((5, 9), np.uint8)},
        {"times/2": np.uint8(3)},
        {"times/2": np.full((6, 9), 16, np.uint8)},
        {"values/2": np.zeros(400)},
        {"times/2": np.array([None] * 6)},
    ],
    ids=["float", "int64", "rank", "batch", "a number", "late", "window", "objects"],
)
def test_spike_times_of_another_kind_are_refused_by_name(tmp_path, change):
    save_spike_times(dense(), torch.rand(6, 12), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "b.npz", **(arrays | change))
    with pytest.raises(InputError, match=r"b\.npz"):
        load_spike_times(tmp_path / "b.npz")


def test_times_outside_a_window_have_no_value():
    net = dense()
    with pytest.raises(InputError, match="outside a window of 16"):
        decode_times(net, "2", torch.full((1, 9), 20, dtype=torch.uint8))
    with pytest.raises(InputError, match="are uint8"):
        decode_times(net, "2", torch.full((1, 9), -3))
