"""Image sets read from disk, and their latency code."""

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from snn_sparse_plugin import ConfigError, InputError, SpikeTrain
from snn_sparse_plugin.core.spikes import coordinates
from snn_sparse_plugin.data import SpikeFile, latency_spikes, load_images

IMAGES, LABELS = 0x803, 0x801


def idx(magic: int, array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}i", magic, *array.shape) + array.astype(np.uint8).tobytes()


def write_set(
    folder: Path, *, zipped: bool, train: int = 7, test: int = 3, size: int = 4
) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", train), ("t10k", test)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, size, size))
        arrays[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, count)
    for name, array in arrays.items():
        data = idx(IMAGES if array.ndim == 3 else LABELS, array)
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)
    return arrays


@pytest.mark.parametrize("zipped", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize(
    ("name", "below"),
    [("mnist", "."), ("mnist", "MNIST/raw"), ("fashion-mnist", "."), ("fashion-mnist", "FashionMNIST/raw")],
)
def test_idx_files_are_read_from_every_layout(tmp_path: Path, name: str, below: str, zipped: bool) -> None:
    arrays = write_set(tmp_path / below, zipped=zipped)
    data = load_images(name, tmp_path)
    assert data.train_x.shape == (7, 16)
    assert data.test_x.shape == (3, 16)
    assert data.train_x.dtype == torch.float32
    np.testing.assert_allclose(
        data.train_x.numpy() * 255, arrays["train-images-idx3-ubyte"].reshape(7, 16), atol=1e-4
    )
    assert data.test_y.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()


def truncated(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])


def foreign(folder: Path) -> None:
    (folder / "train-images-idx3-ubyte").write_bytes(b"<html>404 not found</html>")


def empty(folder: Path) -> None:
    (folder / "train-images-idx3-ubyte").write_bytes(b"")


def missing(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte").unlink()


def swapped(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes((folder / "train-images-idx3-ubyte").read_bytes())


def miscounted(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(LABELS, np.zeros(6)))


def mislabelled(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(LABELS, np.full(7, 26)))


def half_a_gzip(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte"
    path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes())[:-9])
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "holds 107 bytes of data, its header promises 112"),
        (foreign, "is not an idx file of images: it starts with 0x3c68746d"),
        (empty, "is not an idx file of images"),
        (missing, "t10k-labels-idx1-ubyte.* is missing"),
        (swapped, "is not an idx file of labels"),
        (miscounted, "7 train images but 6 labels"),
        (mislabelled, "labels go up to 26"),
        (half_a_gzip, "not a complete gzip file"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path: Path, damage, message: str) -> None:
    write_set(tmp_path, zipped=False)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        load_images("mnist", tmp_path)


def test_a_folder_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    write_set(tmp_path / "data", zipped=True)
    assert load_images("mnist", "~/data").pixels > 0


def test_an_empty_folder_says_which_files_are_expected_where(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte.*FashionMNIST/raw"):
        load_images("fashion-mnist", tmp_path)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        load_images("mnist", tmp_path / "nowhere")


def test_files_on_disk_need_a_root() -> None:
    with pytest.raises(ConfigError, match="--root"):
        load_images("mnist")


def test_an_unknown_set_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="digits, mnist, fashion-mnist"):
        load_images("cifar")


def test_digits_are_split_and_scaled() -> None:
    pytest.importorskip("sklearn")
    data = load_images("digits")
    assert data.train_x.shape == (1437, 64)
    assert data.test_x.shape == (360, 64)
    assert (data.train_x.min(), data.train_x.max()) == (0, 1)
    assert data.test_y.bincount(minlength=10).min() > 20
    small = data.limited(100)
    assert (len(small.train_y), len(small.test_y)) == (100, 25)
    assert data.limited(None) is data


def test_latency_code_follows_its_formula() -> None:
    torch.manual_seed(0)
    x = torch.rand(6, 33)
    x[0, :4] = torch.tensor([0.0, 0.2, 1.0, 0.5])
    train = latency_spikes(x, steps=40)
    expected = torch.zeros(40, 6, 33)
    for b in range(6):
        for n in range(33):
            value = float(x[b, n])
            if value > 0.2:
                t = int(20 * math.log(value / (value - 0.2)))
                if t < 40:
                    expected[t, b, n] = 1
    assert torch.equal(train.to_dense(), expected)
    # the events are in canonical order: converting the dense form gives the same train
    again = SpikeTrain.from_sparse_csr(train.to_sparse_csr(), 6)
    assert torch.equal(again.to_dense(), expected)
    rows, columns = coordinates(train.indptr, train.indices)
    keys = rows * 33 + columns
    assert bool((keys[1:] > keys[:-1]).all())


@pytest.mark.parametrize(
    ("x", "steps", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), 5, "floating dtype"),
        (torch.zeros(2, 3, 3), 5, "flatten"),
        (torch.tensor([[float("nan")]]), 5, "NaN"),
        (torch.zeros(2, 3), 0, "steps >= 1"),
    ],
    ids=["integer", "not flat", "nan", "no steps"],
)
def test_latency_code_refuses(x: torch.Tensor, steps: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        latency_spikes(x, steps)


def test_a_black_batch_is_silent() -> None:
    train = latency_spikes(torch.zeros(2, 3), steps=5)
    assert train.events == 0
    assert train.shape == (5, 2, 3)


def write_cifar(path: Path, **changes: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "train_x": rng.integers(0, 256, (5, 32, 32, 3)).astype(np.uint8),
        "train_y": rng.integers(0, 10, 5),
        "test_x": rng.integers(0, 256, (3, 3, 32, 32)).astype(np.uint8),
        "test_y": rng.integers(0, 10, 3),
    }
    arrays |= changes
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return arrays


def test_cifar_from_npz_in_both_orders(tmp_path: Path) -> None:
    arrays = write_cifar(tmp_path / "cifar10.npz")
    data = load_images("cifar10", tmp_path)
    assert (data.classes, data.pixels) == (10, 3072)
    expected = arrays["train_x"].transpose(0, 3, 1, 2).reshape(5, -1) / 255
    np.testing.assert_allclose(data.train_x.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(data.test_x.numpy(), arrays["test_x"].reshape(3, -1) / 255, atol=1e-6)
    assert data.test_y.tolist() == arrays["test_y"].tolist()
    write_cifar(tmp_path / "cifar10.npz", train_y=arrays["train_y"][:, None])  # as Keras stores them
    assert load_images("cifar10", tmp_path).train_y.tolist() == arrays["train_y"].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_x": np.zeros((5, 28, 28), np.uint8)}, r"uint8 \(N, 3, 32, 32\), got uint8 \(5, 28, 28\)"),
        ({"test_x": np.zeros((3, 3, 32, 32))}, "got float64"),
        ({"train_y": np.arange(4)}, "5 cifar10 images need as many whole labels"),
        ({"test_y": np.array([0, 1, 10])}, "labels, 0 to 9"),
        ({"test_y": np.eye(10)[:3]}, "whole labels"),
    ],
    ids=["shape", "dtype", "count", "class", "one-hot"],
)
def test_broken_cifar_files(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    write_cifar(tmp_path / "cifar10.npz", **changes)
    with pytest.raises(InputError, match=message):
        load_images("cifar10", tmp_path)


def test_cifar_that_is_no_archive(tmp_path: Path) -> None:
    for content in (b"not a zip", b"", b"PK\x03\x04"):
        (tmp_path / "cifar100.npz").write_bytes(content)
        with pytest.raises(InputError, match="does not hold train_x"):
            load_images("cifar100", tmp_path)
    with pytest.raises(ConfigError, match="--root"):
        load_images("cifar10")


def spike_file(path: Path, times: list[list[float]], units: list[list[int]], labels: list[int]) -> Path:
    h5py = pytest.importorskip("h5py", reason="the data extra is not installed")
    with h5py.File(path, "w") as file:
        group = file.create_group("spikes")
        for name, rows, dtype in (("times", times, np.float16), ("units", units, np.uint16)):
            data = group.create_dataset(name, (len(rows),), dtype=h5py.vlen_dtype(np.dtype(dtype)))
            for k, row in enumerate(rows):
                data[k] = np.array(row, dtype)
        file.create_dataset("labels", data=np.array(labels, np.uint8))
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["gz", "plain"])
def test_recorded_spikes_become_events(tmp_path: Path, zipped: bool) -> None:
    path = spike_file(
        tmp_path / "shd_test.h5",
        [[0.0, 0.0011, 0.0012, 0.0052], [0.003], []],
        [[3, 1, 1, 2], [0], []],
        [7, 4, 9],
    )
    if zipped:
        (tmp_path / "shd_test.h5.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "shd_test.h5.gz"
    data = SpikeFile(path, channels=5)
    assert len(data) == 3
    train, labels = data.batch([1, 0, 2], dt=0.001, T=5)
    assert labels.tolist() == [4, 7, 9]
    expected = torch.zeros(5, 3, 5)
    expected[3, 0, 0] = expected[0, 1, 3] = expected[1, 1, 1] = (
        1  # two in one bin are one; what is late is left out
    )
    assert torch.equal(train.to_dense(), expected)
    assert len(SpikeFile(path, channels=5, limit=2)) == 2
    with pytest.raises(ConfigError, match="length of a step"):
        data.batch([0], dt=0.0, T=5)


def test_bad_recordings_are_refused(tmp_path: Path) -> None:
    path = spike_file(tmp_path / "a.h5", [[0.0]], [[9]], [1])
    with pytest.raises(InputError, match="unit 9, expected 5 channels"):
        SpikeFile(path, channels=5)
    with pytest.raises(ConfigError, match="no file"):
        SpikeFile(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no spikes here")
    with pytest.raises(InputError, match="not an HDF5 file"):
        SpikeFile(tmp_path / "text.h5")
    import h5py

    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.create_dataset("labels", data=np.zeros(1))
    with pytest.raises(InputError, match="layout of SHD"):
        SpikeFile(tmp_path / "other.h5")
