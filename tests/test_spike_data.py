"""Sets as events: what a batch holds, the order of batches, and files of spikes in tiny versions of each format."""

import gzip
import hashlib
import pickle
import re
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import spike_file, write_set
from torch.utils.data import DataLoader

from snn_sparse_plugin import ConfigError, InputError, SpikeTrain
from snn_sparse_plugin.core.spikes import check_csr
from snn_sparse_plugin.data import (
    SETS,
    SpikeDataset,
    SpikeFile,
    check_files,
    collate,
    latency_spikes,
    load_images,
    load_spikes,
    loader,
    official,
)
from snn_sparse_plugin.data.dataset import EventStore


def random_set(samples: int = 11, T: int = 6, features: int = 9) -> tuple[SpikeDataset, torch.Tensor]:
    dense = (torch.rand(T, samples, features) < 0.2).float()
    return SpikeDataset.from_spikes(SpikeTrain.from_dense(dense), torch.arange(samples) * 3), dense


def same(a: SpikeTrain, b: SpikeTrain) -> bool:
    return a.shape == b.shape and torch.equal(a.indptr, b.indptr) and torch.equal(a.indices, b.indices)


@pytest.mark.parametrize(
    "indices", [[4, 0, 4, 10], [], [-1, -11], torch.tensor([2]), np.array([1, 2]), range(11)]
)
def test_a_batch_is_the_chosen_samples_in_order(indices) -> None:
    data, dense = random_set()
    train, labels = data.batch(indices)
    chosen = torch.as_tensor(list(indices), dtype=torch.long) % 11
    assert train.shape == (6, len(chosen), 9)
    assert torch.equal(train.to_dense(), dense[:, chosen])
    assert labels.tolist() == (chosen * 3).tolist()
    check_csr(train.indptr, train.indices, 9)  # in canonical order too


@pytest.mark.parametrize("indices", [[4, 0, 4, -1], [], torch.randperm(11)], ids=["some", "none", "all"])
def test_a_subset_is_a_set_of_the_chosen_samples(indices) -> None:
    data, _ = random_set()
    part = data.subset(indices)
    assert len(part) == len(indices)
    everything, labels = part.batch(range(len(part)))
    expected, expected_labels = data.batch(indices)
    assert same(everything, expected)
    assert torch.equal(labels, expected_labels)
    assert (part.T, part.features, part.columns.dtype) == (data.T, data.features, data.columns.dtype)
    with pytest.raises(IndexError, match="of a set of 11"):
        data.subset([11])


def test_one_sample_and_what_is_outside() -> None:
    data, dense = random_set()
    train, label = data[3]
    assert torch.equal(train.to_dense()[:, 0], dense[:, 3])
    assert int(label) == 9
    for wrong in ([11], [0, -12]):
        with pytest.raises(IndexError, match="of a set of 11"):
            data.batch(wrong)
    for mask in (data.labels == 9, [0.5]):
        with pytest.raises(IndexError, match="chosen by their numbers"):
            data.batch(mask)


def test_a_set_is_checked_unless_it_is_trusted() -> None:
    ends = torch.tensor([[1, 2], [0, 1]], dtype=torch.int32)
    columns, labels = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 1])
    assert len(SpikeDataset(columns, ends, labels, 3)) == 2
    with pytest.raises(InputError, match="0…1"):
        SpikeDataset(columns, ends, labels, 2)
    with pytest.raises(InputError, match="promise 3 events"):
        SpikeDataset(columns[:2], ends, labels, 3)
    with pytest.raises(InputError, match="each of 1 labels"):
        SpikeDataset(columns, ends, labels[:1], 3)
    with pytest.raises(InputError, match="graded"):
        SpikeDataset.from_spikes(SpikeTrain.from_dense(torch.full((2, 2, 3), 0.5)), labels)


@settings(max_examples=25, deadline=None)
@given(
    events=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(0, 4)), max_size=40),
    T=st.integers(1, 6),
)
def test_events_in_any_order_become_spikes(events: list[tuple[int, int, int]], T: int) -> None:
    store = EventStore(T, 5)
    expected = torch.zeros(T, 8, 5)
    for first in (0, 4):  # in two parts
        sample, step, column = np.array(events, np.int64).reshape(-1, 3).T
        store.add(sample, step, column, samples=4)
        for s, t, c in events:
            if t < T:
                expected[t, first + s, c] = 1
    train, _ = store.done(np.arange(8)).batch(range(8))
    assert torch.equal(train.to_dense(), expected)
    check_csr(train.indptr, train.indices, 5)


def test_many_features_take_four_bytes() -> None:
    store = EventStore(2, 70_000)
    store.add(np.array([0, 0]), np.array([1, 1]), np.array([69_999, 65_536]), samples=1)
    data = store.done(np.array([0]))
    assert data.columns.dtype == torch.int32
    assert data.batch([0])[0].indices.tolist() == [65_536, 69_999]


# --- batches ---


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_order_depends_on_the_generator_alone(num_workers: int) -> None:
    data, dense = random_set(samples=23)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(7)
    batches = loader(data, 5, shuffle=True, generator=generator, num_workers=num_workers)
    state = generator.get_state()
    order = torch.randperm(23, generator=torch.Generator().manual_seed(7))
    seen = list(batches)
    assert len(batches) == len(seen) == 5
    for (x, y), chosen in zip(seen, order.split(5), strict=True):
        assert torch.equal(x.to_dense(), dense[:, chosen])
        assert torch.equal(y, chosen * 3)
    other = [y.tolist() for _, y in batches]
    assert other != [y.tolist() for _, y in seen]  # the next epoch has another order
    generator.set_state(state)
    assert [y.tolist() for _, y in batches] == [y.tolist() for _, y in seen]  # a resumed one the same
    assert torch.equal(torch.get_rng_state(), before)


def test_in_order_and_without_the_rest() -> None:
    data, _ = random_set(samples=23)
    assert [y[0].item() // 3 for _, y in loader(data, 5)] == [0, 5, 10, 15, 20]
    kept = loader(data, 5, drop_last=True)
    assert len(kept) == len(list(kept)) == 4
    with pytest.raises(ConfigError, match="batch_size"):
        loader(data, 0)


def test_own_samples_in_an_ordinary_dataloader() -> None:
    data, dense = random_set()
    batches = DataLoader(data, batch_size=4, collate_fn=collate)
    x, y = next(iter(batches))
    assert same(x, data.batch(range(4))[0])
    assert y.tolist() == [0, 3, 6, 9]
    graded = SpikeTrain.from_dense(torch.full((6, 1, 9), 0.5))
    mixed, _ = collate([data[0], (graded, 1)])
    assert torch.equal(mixed.to_dense(), torch.cat([dense[:, :1], graded.to_dense()], dim=1))
    _, targets = collate([(graded, 0.25), (graded, 1.5)])  # not rounded to classes
    assert targets.tolist() == [0.25, 1.5]


def test_samples_that_do_not_go_together() -> None:
    x = SpikeTrain.from_dense(torch.ones(2, 1, 3))
    with pytest.raises(InputError, match="same steps and features"):
        collate([(x, 0), (SpikeTrain.from_dense(torch.ones(3, 1, 3)), 0)])
    with pytest.raises(InputError, match="at least one"):
        collate([])
    with pytest.raises(InputError, match="no gradient"):
        collate([(SpikeTrain.from_dense(torch.ones(2, 1, 3, requires_grad=True)), 0)])


def test_a_train_is_pickled() -> None:
    train = random_set()[0].batch([1, 2])[0]
    again = pickle.loads(pickle.dumps(train))
    assert same(again, train)
    assert (again.dtype, again.values, again.requires_grad) == (torch.float32, None, False)


@pytest.mark.gpu
def test_pinned_batches_move_to_the_device() -> None:
    data, dense = random_set()
    ((x, _),) = loader(data, 11, pin_memory=True)
    assert x.indices.is_pinned()
    moved = x.to("cuda", non_blocking=True)
    assert torch.equal(moved.to_dense().cpu(), dense)


# --- images ---


def test_digits_in_the_latency_code() -> None:
    pytest.importorskip("sklearn")
    data, raw = load_spikes("digits"), load_images("digits")
    assert (data.T, data.features, data.classes, data.dt) == (100, 64, 10, 1e-3)
    for part, x, y in ((data.train, raw.train_x, raw.train_y), (data.test, raw.test_x, raw.test_y)):
        assert same(part.batch(range(len(part)))[0], latency_spikes(x, 100))
        assert torch.equal(part.labels, y)


@pytest.mark.parametrize(("steps", "dt"), [(None, None), (30, 2e-3)])
def test_idx_images_in_the_latency_code(tmp_path: Path, steps: int | None, dt: float | None) -> None:
    write_set(tmp_path, zipped=True, train=50, test=20)
    data, raw = load_spikes("fashion-mnist", tmp_path, steps=steps, dt=dt), load_images("mnist", tmp_path)
    expected = latency_spikes(raw.train_x, steps or 100, tau=20e-3 / (dt or 1e-3))
    assert same(data.train.batch(range(50))[0], expected)
    assert data.train.T == data.T == expected.T
    few = load_spikes("fashion-mnist", tmp_path, limit=20)
    assert (len(few.train), len(few.test)) == (20, 8)
    assert few.train.labels.tolist() == raw.train_y[torch.arange(20) * 50 // 20].tolist()


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("cifar10", {}, ConfigError, "known: digits, mnist"),
        ("shd", {}, ConfigError, "--root"),
        ("digits", {"steps": 0}, ConfigError, "at least 1"),
        ("digits", {"dt": 0.0}, ConfigError, "finite and > 0"),
        ("digits", {"dt": float("nan")}, ConfigError, "finite and > 0"),
        ("digits", {"limit": 0}, ConfigError, "at least 1"),
        ("shd", {"root": "nowhere"}, InputError, "nowhere is not a folder"),
        ("n-mnist", {"root": "nowhere"}, InputError, "nowhere is not a folder"),
    ],
)
def test_what_cannot_be_loaded(name: str, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_spikes(name, **options)


# --- recorded spikes ---


def write_shd(folder: Path, name: str = "shd", samples: int = 6) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "test", "valid"):
        times = [np.sort(rng.random(n)) for n in range(3, 3 + samples)]
        units = [rng.integers(0, 700, len(time)) for time in times]
        spike_file(folder / f"{name}_{part}.h5", times, units, list(range(samples)))  # type: ignore[arg-type]


def packed(path: Path, kind: str) -> None:
    if kind == ".gz":
        path.with_name(path.name + kind).write_bytes(gzip.compress(path.read_bytes()))
    elif kind == ".zip":
        with zipfile.ZipFile(path.with_name(path.name + kind), "w") as archive:
            archive.write(path, path.name)
    if kind:
        path.unlink()


@pytest.mark.parametrize("kind", ["", ".gz", ".zip"])
def test_recorded_spikes_are_binned_once(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "SHD"  # tonic's
    folder.mkdir()
    write_shd(folder)
    expected = SpikeFile(folder / "shd_train.h5").batch(range(6), dt=2e-3, T=500)[0]
    for path in folder.glob("*.h5"):
        packed(path, kind)
    data = load_spikes("shd", tmp_path)
    assert (data.T, data.features, data.classes, data.dt, data.valid) == (500, 700, 20, 2e-3, None)
    assert same(data.train.batch(range(6))[0], expected)
    assert data.train.labels.tolist() == list(range(6))
    assert load_spikes("shd", tmp_path, limit=3).train.labels.tolist() == [0, 2, 4]


def test_speech_commands_have_a_part_for_validation(tmp_path: Path) -> None:
    write_shd(tmp_path, "ssc")
    data = load_spikes("ssc", tmp_path, steps=20, dt=0.05)
    assert data.valid is not None
    assert (len(data.valid), data.classes, data.train.T) == (6, 35, 20)


def test_damaged_recordings_are_named(tmp_path: Path) -> None:
    write_shd(tmp_path)
    train, test = tmp_path / "shd_train.h5", tmp_path / "shd_test.h5"
    whole = train.read_bytes()
    train.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"shd_train.h5 is (not an HDF5 file|truncated)"):
        load_spikes("shd", tmp_path)
    (tmp_path / "shd_train.h5.gz").write_bytes(gzip.compress(whole)[:-20])
    train.unlink()
    with pytest.raises(InputError, match="not a complete .gz file"):
        load_spikes("shd", tmp_path)
    (tmp_path / "shd_train.h5.gz").unlink()
    with pytest.raises(InputError, match=r"expected shd_train.h5\[.gz"):
        load_spikes("shd", tmp_path)
    (tmp_path / "shd_train.h5.zip").write_bytes(b"no zip")
    with pytest.raises(InputError, match="not a complete .zip file"):
        load_spikes("shd", tmp_path)
    with zipfile.ZipFile(tmp_path / "shd_train.h5.zip", "w") as archive:
        archive.writestr("readme.txt", "no recordings")
    with pytest.raises(InputError, match="holds 0 .h5 files"):
        load_spikes("shd", tmp_path)
    for times, units, labels, message in (
        ([[0.1]], [[1]], [20], "labels 20…20, expected classes 0 to 19"),
        ([[0.1, 0.2]], [[1]], [0], "recording 0 has 2 times and 1 units"),
        ([[-0.1]], [[1]], [0], "spike at -0.09"),
        ([[float("nan")]], [[1]], [0], "spike at nan"),
    ):
        spike_file(tmp_path / "shd_train.h5", times, units, labels)
        with pytest.raises(InputError, match=message):
            load_spikes("shd", tmp_path)
    assert test.is_file()


# --- official files ---


def test_checksums_are_those_of_tonic() -> None:
    datasets = pytest.importorskip("tonic.datasets", reason="the data extra is not installed")
    for name, kind in (("n-mnist", "NMNIST"), ("dvs-gesture", "DVSGesture"), ("shd", "SHD"), ("ssc", "SSC")):
        cls = getattr(datasets, kind)
        parts = ("train", "test", "valid") if name == "ssc" else ("train", "test")
        files = {p: getattr(cls, f"{p}_filename", None) or getattr(cls, f"{p}_zip") for p in parts}
        theirs = {file.lower(): getattr(cls, f"{p}_md5") for p, file in files.items()}
        assert official.CHECKSUMS[name] == theirs


def test_checksums_are_those_of_torchvision() -> None:
    found = find_spec("torchvision")  # its wheel cannot be imported beside every build of torch
    if found is None or found.origin is None:
        pytest.skip("torchvision is not installed")
    source = (Path(found.origin).parent / "datasets" / "mnist.py").read_text()
    for name, kind in (("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")):
        body = re.search(rf"class {kind}\(.*?resources = \[(.*?)\]", source, re.DOTALL)
        assert body is not None
        assert dict(re.findall(r'\("(\S+?)", "(\w{32})"\)', body[1])) == official.CHECKSUMS[name]


def test_a_file_that_is_not_the_official_one_is_named_if_asked(tmp_path: Path, monkeypatch, recwarn) -> None:
    write_set(tmp_path, zipped=True)
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    monkeypatch.setitem(official.CHECKSUMS, "mnist", sums)
    load_spikes("mnist", tmp_path, verify=True)
    assert list(check_files("mnist", tmp_path).values()) == [True] * 4
    assert not recwarn.list
    sums["t10k-labels-idx1-ubyte.gz"] = "0" * 32
    load_spikes("mnist", tmp_path)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="t10k-labels-idx1-ubyte.gz is not the official file of mnist"):
        load_spikes("mnist", tmp_path, verify=True)
    sums.clear()
    with pytest.warns(UserWarning, match="none could be compared"):
        load_spikes("mnist", tmp_path, verify=True)


def test_every_set_is_described() -> None:
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    for name, known in SETS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {known.T} |" in row
        assert f"| {1000 * known.dt:g} ms |" in row
