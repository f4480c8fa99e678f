"""Recordings of event cameras: tiny ones in the official formats, tonic as the judge, and real ones where there are."""

import functools
import hashlib
import http.server
import io
import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from snn_sparse_plugin import ConfigError, InputError
from snn_sparse_plugin.data import from_tonic, load_spikes
from snn_sparse_plugin.data.recordings import decode_nmnist


def nmnist_file(events: list[tuple[int, int, int, int]]) -> bytes:
    """(t, x, y, p) in the official five bytes."""
    return b"".join(bytes([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255]) for t, x, y, p in events)


def random_events(rng: np.random.Generator, count: int, pixels: int) -> list[tuple[int, int, int, int]]:
    t = np.sort(rng.integers(0, 320_000, count))
    return [(int(a), *map(int, rng.integers(0, pixels, 2)), int(rng.integers(0, 2))) for a in t]


def write_nmnist(folder: Path, *, zipped: bool) -> dict[str, list[tuple[int, list]]]:
    """Both parts, two recordings a class; -> label and events of each, in the order they are read."""
    rng = np.random.default_rng(0)
    parts = {}
    for part in ("Train", "Test"):
        files = {}
        for digit in range(3):
            for k in (2, 5):
                files[f"{digit}/{k:05d}.bin"] = digit, random_events(rng, 30, 34)
        parts[part] = [files[name] for name in sorted(files)]
        if zipped:
            with zipfile.ZipFile(folder / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                for name, (_, events) in reversed(files.items()):
                    archive.writestr(f"{part}/{name}", nmnist_file(events))
        else:
            for name, (_, events) in files.items():
                path = folder / part / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(nmnist_file(events))
    return parts


def dense(recordings: list, T: int, dt_us: int, pixels: int, *, polarities: int) -> torch.Tensor:
    out = torch.zeros(T, len(recordings), polarities, pixels, pixels)
    for sample, (_, events) in enumerate(recordings):
        for t, x, y, p in events:
            if t // dt_us < T:
                out[t // dt_us, sample, p if polarities == 2 else 0, y, x] = 1
    return out.flatten(2)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "folder"])
@pytest.mark.parametrize("below", [".", "NMNIST"])
def test_nmnist_from_the_official_files(tmp_path: Path, zipped: bool, below: str) -> None:
    (tmp_path / below).mkdir(exist_ok=True)
    parts = write_nmnist(tmp_path / below, zipped=zipped)
    data = load_spikes("n-mnist", tmp_path)
    assert (data.T, data.features, data.classes, data.dt) == (300, 1156, 10, 1e-3)
    for part, found in ((data.train, parts["Train"]), (data.test, parts["Test"])):
        assert part.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert torch.equal(part.batch(range(6))[0].to_dense(), dense(found, 300, 1000, 34, polarities=1))
    split = load_spikes("n-mnist", tmp_path, steps=7, dt=0.0405, merge_polarity=False, limit=3)
    assert split.train.labels.tolist() == [0, 1, 2]  # of every class
    expected = dense(parts["Train"][::2], 7, 40_500, 34, polarities=2)
    assert torch.equal(split.train.batch(range(3))[0].to_dense(), expected)
    assert len(split.test) == 3


def test_a_recording_is_read_as_tonic_reads_it() -> None:
    tonic_io = pytest.importorskip("tonic.io", reason="the data extra is not installed")
    from tonic.datasets import NMNIST

    rng = np.random.default_rng(1)
    events = random_events(rng, 200, 34)
    for k in (50, 51, 120):
        events[k] = (events[k][0], 0, 240, 0)  # the clock runs over
    data = nmnist_file(events)
    theirs = tonic_io.read_mnist_file(io.BytesIO(data), dtype=NMNIST.dtype, is_stream=True)
    ours = decode_nmnist(data)
    for field in "txyp":
        assert np.array_equal(getattr(ours, field), theirs[field]), field
    assert ours.t.max() > 320_000


def test_any_data_set_of_tonic(tmp_path: Path) -> None:
    """DVS Gesture in tonic's folder, read by tonic and by us."""
    datasets = pytest.importorskip("tonic.datasets", reason="the data extra is not installed")
    rng = np.random.default_rng(2)
    parts = {}
    for part in ("Train", "Test"):
        (tmp_path / "DVSGesture").mkdir(exist_ok=True)
        (tmp_path / "DVSGesture" / f"ibmGesture{part}.tar.gz").write_bytes(b"tonic looks whether it is there")
        for user in range(1, 11):
            folder = tmp_path / "DVSGesture" / f"ibmGesture{part}" / f"user{user:02d}_led"
            folder.mkdir(parents=True)
            for label in range(10):
                events = rng.integers(0, (128, 128, 2, 1600), (20, 4))
                np.save(folder / f"{label}.npy", events[np.argsort(events[:, 3])])
        parts[part] = datasets.DVSGesture(str(tmp_path), train=part == "Train")
    data = load_spikes("dvs-gesture", tmp_path)
    assert (data.T, data.features, data.classes, data.dt) == (300, 2 * 128 * 128, 11, 5e-3)
    theirs = from_tonic(parts["Train"], 300, 5e-3)
    assert len(data.train) == len(theirs) == 100
    # tonic lists the files of a folder as the file system does
    order = sorted(range(100), key=lambda k: Path(parts["Train"].data[k]).as_posix())
    ours, labels = data.train.batch(range(100))
    expected, expected_labels = theirs.batch(order)
    assert torch.equal(ours.indptr, expected.indptr)
    assert torch.equal(ours.indices, expected.indices)
    assert torch.equal(labels, expected_labels)
    merged = load_spikes("dvs-gesture", tmp_path, merge_polarity=True, limit=5)
    assert merged.features == 128 * 128


class Recorded:
    """A data set in tonic's form, in memory."""

    sensor_size = (700, 1, 1)

    def __init__(self, *samples: tuple[np.ndarray, int]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.samples[index]


def structured(rows: list[tuple[int, int]]) -> np.ndarray:
    return np.array(rows, dtype=[("t", int), ("x", int)])


def test_tonic_events_without_rows_and_polarity() -> None:
    data = from_tonic(Recorded((structured([(0, 699), (2500, 1)]), 4), (structured([]), 2)), 3, 1e-3)
    assert data.labels.tolist() == [4, 2]
    assert data.batch([0, 1])[0].to_dense().nonzero().tolist() == [[0, 0, 699], [2, 0, 1]]
    finer = from_tonic(Recorded((structured([(3, 0), (4, 1)]), 0)), 4, 2.5e-6)
    assert finer.batch([0])[0].to_dense().nonzero().tolist() == [[1, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize("dt", [0.0, -1e-3, float("inf"), float("nan")])
def test_a_step_has_a_length(dt: float) -> None:
    with pytest.raises(ConfigError, match="length of a step"):
        from_tonic(Recorded((structured([(0, 1)]), 0)), 3, dt)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (np.zeros((3, 2)), "structured array with fields t and x, got fields none"),
        (structured([(0, 700)]), "sample 0 has x 700…700, expected 0…699"),
        (structured([(-1, 0)]), "event at -1 µs"),
    ],
    ids=["frames", "pixel", "time"],
)
def test_tonic_samples_that_are_no_events(sample: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_tonic(Recorded((sample, 0)), 3, 1e-3)


def replaced(folder: Path, name: str, data: bytes) -> None:
    path = folder / "Train.zip"
    with zipfile.ZipFile(path) as archive:
        files = {n: archive.read(n) for n in archive.namelist()} | {name: data}
    with zipfile.ZipFile(path, "w") as archive:
        for n, content in files.items():
            archive.writestr(n, content)


def flipped_byte(folder: Path) -> None:
    path = folder / "Train.zip"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("Train/1/00002.bin")
    data[info.header_offset + 30 + len(info.filename) + 5] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: replaced(f, "Train/0/00002.bin", b"1234567"),
            r"Train/0/00002.bin is not a recording.*7 bytes",
        ),
        (lambda f: replaced(f, "Train/0/00002.bin", b""), "00002.bin is not a recording"),
        (lambda f: replaced(f, "Train/0/00002.bin", bytes([34, 0, 0, 0, 0])), "x 34…34, expected 0…33"),
        (
            lambda f: replaced(f, "Train/zero/00002.bin", bytes(5)),
            "zero/00002.bin does not name a class 0 to 9",
        ),
        (lambda f: replaced(f, "Train/12/00002.bin", bytes(5)), "12/00002.bin does not name a class 0 to 9"),
        (flipped_byte, r"00002.bin is not a recording of n-mnist"),
        (
            lambda f: (f / "Train.zip").write_bytes((f / "Train.zip").read_bytes()[:-30]),
            "not a complete zip file",
        ),
        (lambda f: (f / "Test.zip").unlink(), r"for the test part.*Test, Test.zip"),
        (lambda f: zipfile.ZipFile(f / "Test.zip", "w").close(), "no n-mnist recordings"),
    ],
    ids=["cut", "empty", "pixel", "folder", "class", "crc", "half a zip", "missing", "an empty zip"],
)
def test_damaged_recordings_are_named(tmp_path: Path, damage, message: str) -> None:
    write_nmnist(tmp_path, zipped=True)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        load_spikes("n-mnist", tmp_path)


def test_a_gesture_that_is_no_array(tmp_path: Path) -> None:
    for part, content in (("Train", b"text"), ("Test", b"")):
        folder = tmp_path / f"ibmGesture{part}" / "user01_led"
        folder.mkdir(parents=True)
        (folder / "0.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"user01_led/0.npy is not a recording of dvs-gesture"):
        load_spikes("dvs-gesture", tmp_path)


class Served(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_download_through_tonic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tonic fetches, checks and unpacks; here from this machine, and 12 recordings instead of 70,000."""
    datasets = pytest.importorskip("tonic.datasets", reason="the data extra is not installed")
    server_folder, root = tmp_path / "server", tmp_path / "root"
    server_folder.mkdir()
    root.mkdir()
    write_nmnist(server_folder, zipped=True)
    handler = functools.partial(Served, directory=str(server_folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for part in ("train", "test"):
        file = f"{part.title()}.zip"
        monkeypatch.setattr(datasets.NMNIST, f"{part}_url", f"http://127.0.0.1:{server.server_port}/{file}")
        digest = hashlib.md5((server_folder / file).read_bytes()).hexdigest()
        monkeypatch.setattr(datasets.NMNIST, f"{part}_md5", digest)
    for variable in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    try:
        data = load_spikes("n-mnist", root, download=True)
        monkeypatch.setattr(datasets.NMNIST, "test_md5", "0" * 32)
        with pytest.raises(InputError, match="tonic could not fetch n-mnist"):
            load_spikes("n-mnist", tmp_path, download=True)
    finally:
        server.shutdown()
        server.server_close()
    assert (len(data.train), len(data.test)) == (6, 6)
    expected = load_spikes("n-mnist", server_folder)
    assert torch.equal(data.train.batch(range(6))[0].indices, expected.train.batch(range(6))[0].indices)


REAL = os.environ.get("SNN_SPARSE_DATA", "")


@pytest.mark.skipif(not REAL, reason="SNN_SPARSE_DATA does not name a folder with real data")
@pytest.mark.parametrize(
    ("name", "folder", "samples", "density"),
    [
        ("fashion-mnist", "fashion-mnist", (60_000, 10_000), 0.0042),
        ("n-mnist", "n-mnist-1k", (1000, 100), 0.0119),
        ("shd", "hd-spikes", (3329, 671), 0.0165),
    ],
)
def test_real_data(name: str, folder: str, samples: tuple[int, int], density: float) -> None:
    root = Path(REAL) / folder
    if not root.is_dir():
        pytest.skip(f"no {root}")
    data = load_spikes(name, root)
    assert (len(data.train), len(data.test)) == samples
    assert data.train.density == pytest.approx(density, rel=0.02)
    assert data.train.labels.bincount().min() > 50
