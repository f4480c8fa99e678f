"""Data files of the wrong kind, with impossible numbers, or that unpack to more than data does: refused by name."""

import errno
import gzip
import io
import os
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_data import IMAGES, idx, write_cifar, write_set
from test_recordings import Recorded, nmnist_file, write_nmnist
from test_spike_data import write_shd

from snn_sparse_plugin import InputError
from snn_sparse_plugin.core.errors import FileError
from snn_sparse_plugin.data import SpikeFile, from_tonic, load_images, load_spikes
from snn_sparse_plugin.files import unpack

LATEST = 2**63 - 1


def refused(file: str, *words: str):
    """One line that names the file and says the words."""
    rest = "[^\\n]*"
    return pytest.raises(InputError, match=rf"\A{rest}{file}{rest}{rest.join(words)}{rest}\Z")


@pytest.fixture
def tight(monkeypatch):
    """A bound that a test reaches without gigabytes."""
    monkeypatch.setattr(unpack, "_FREE", 1 << 16)


# --- recordings of event cameras ---


def gestures(folder: Path, array, **options) -> Path:
    for part in ("Train", "Test"):
        place = folder / f"ibmGesture{part}" / "user1"
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / "0.npy", array, **options)
    return folder


def events(time, dtype=np.float64):
    return np.array([[1, 2, 1, t] for t in (10, 11, 12, time, 14)], dtype=dtype)


@pytest.mark.parametrize("time", [np.nan, np.inf, -np.inf, -(2.0**63), -5.0, -0.001, 2.0**62, 1e18, 1e300])
def test_a_time_that_no_step_has_is_refused(tmp_path, time):
    with refused("user1/0.npy", "has an event at"):
        load_spikes("dvs-gesture", gestures(tmp_path, events(time)), steps=10)


@pytest.mark.parametrize(
    ("time", "dtype"),
    [
        (2**63 // 1000 + 1, np.int64),
        (2**62, np.int64),
        (2**63, np.uint64),
        (-1, np.int32),
        (np.inf, np.float16),
    ],
)
def test_a_time_is_not_wrapped_when_it_is_scaled(tmp_path, time, dtype):
    with refused("user1/0.npy", "has an event at"):
        load_spikes("dvs-gesture", gestures(tmp_path, events(time, dtype)), steps=10)


def test_late_events_are_left_out_and_fractions_of_a_millisecond_count(tmp_path):
    late = 2**63 // 1000 - 1
    found = load_spikes("dvs-gesture", gestures(tmp_path, events(late, np.int64)), steps=3, dt=5e-3).train
    assert found.ends.tolist() == [[0, 0, 1]]  # one pixel, at 10 to 14 ms
    half = np.array([[1, 2, 1, 9.9], [3, 2, 0, 10.2]])
    found = load_spikes("dvs-gesture", gestures(tmp_path, half), steps=103, dt=1e-4).train
    assert found.ends[0].diff().nonzero().flatten().tolist() == [98, 101]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((5, 3)),
        np.zeros(20),
        np.zeros((5, 4, 1)),
        np.zeros((5, 4), complex),
        np.zeros((5, 4), "U3"),
        np.zeros((5, 4), bool),
        np.zeros((5, 4), "M8[us]"),
        np.zeros(5, [("x", int), ("y", int), ("p", int), ("t", int)]),
        np.array([[1, 2, 1, None]]),
        np.array(3.0),
    ],
    ids=[
        "three columns",
        "flat",
        "rank",
        "complex",
        "text",
        "bool",
        "dates",
        "fields",
        "objects",
        "a number",
    ],
)
def test_a_recording_that_is_no_table_of_numbers(tmp_path, array):
    with refused("user1/0.npy", "is not a recording"):
        load_spikes("dvs-gesture", gestures(tmp_path, array), steps=10)


@pytest.mark.parametrize(
    "row",
    [(128, 0, 0), (-1, 0, 0), (0, 2**40, 0), (0, 0, 2), (0, 0, -1), (0.5, 0, 0), (0, np.nan, 0), (0, 0, 0.5)],
)
def test_a_pixel_outside_the_sensor_or_between_two(tmp_path, row):
    with refused("user1/0.npy", "has (x|y|polarity)"):
        load_spikes("dvs-gesture", gestures(tmp_path, np.array([[*row, 3.0]])), steps=10)


def test_a_recording_that_declares_more_than_it_holds(tmp_path):
    gestures(tmp_path, np.zeros((5, 4)))
    path = tmp_path / "ibmGestureTrain" / "user1" / "0.npy"
    path.write_bytes(path.read_bytes().replace(b"(5, 4), ", b"(9**9,4)").replace(b"(9**9,4)", b"(9999, 4"))
    with refused("user1/0.npy", "is not a recording"):
        load_spikes("dvs-gesture", tmp_path, steps=10)


@pytest.mark.parametrize("where", ["one member", "many members", "nested zeros"])
def test_an_archive_of_recordings_is_unpacked_with_a_bound(tmp_path, tight, where):
    write_nmnist(tmp_path, zipped=True)
    count, size = {"one member": (1, 10**7), "many members": (200, 10**5), "nested zeros": (2, 10**7)}[where]
    with zipfile.ZipFile(tmp_path / "Train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for k in range(count):
            archive.writestr(f"Train/0/{k:05d}.bin", bytes(size))
    with refused("Train.zip", "would unpack to"):
        load_spikes("n-mnist", tmp_path)


def test_a_member_that_is_larger_than_it_declares(tmp_path):
    write_nmnist(tmp_path, zipped=True)
    data = nmnist_file([(5, 1, 1, 0)] * 300)
    with zipfile.ZipFile(tmp_path / "Train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("Train/0/00001.bin", data)
    raw = (tmp_path / "Train.zip").read_bytes()
    (tmp_path / "Train.zip").write_bytes(raw.replace(struct.pack("<I", len(data)), struct.pack("<I", 10)))
    with refused("Train.zip", "00001.bin is not a recording"):
        load_spikes("n-mnist", tmp_path)


# --- data sets of tonic ---


def structured(**columns) -> np.ndarray:
    out = np.empty(2, [(name, np.asarray(values).dtype) for name, values in columns.items()])
    for name, values in columns.items():
        out[name] = values
    return out


@pytest.mark.parametrize(
    "columns",
    [
        {"t": [0.0, np.nan], "x": [0, 1]},
        {"t": [0.0, np.inf], "x": [0, 1]},
        {"t": [0, -1], "x": [0, 1]},
        {"t": [0.0, 1e30], "x": [0, 1]},
        {"t": ["a", "b"], "x": [0, 1]},
        {"t": [0, 1], "x": [0.0, 1.5]},
        {"t": [0, 1], "x": [0, 700]},
        {"t": [0, 1], "x": [0.0, np.nan]},
    ],
)
def test_events_of_tonic_with_impossible_numbers(columns):
    with refused("sample 0"):
        from_tonic(Recorded((structured(**columns), 0)), 3, 1e-3)


@pytest.mark.parametrize("label", [None, "five", 2.5, np.nan, np.inf, 2**70])
def test_a_label_of_tonic_that_is_no_class(label):
    with refused("sample 0", "label"):
        from_tonic(Recorded((structured(t=[0, 1], x=[0, 1]), label)), 3, 1e-3)


@pytest.mark.parametrize("dt", [1e-15, 1e-300, 1e300])
def test_steps_of_any_length_do_not_overflow(dt):
    found = from_tonic(Recorded((structured(t=[0, LATEST // 1000], x=[0, 1]), 0)), 3, dt)
    assert found.ends[0, 0] == (2 if dt > 1 else 1)


# --- recorded spikes in HDF5 ---


def shd(folder: Path, labels=None, times=None, units=None) -> Path:
    """The layout of SHD with whole data sets or, for None, ordinary ones."""
    h5py = pytest.importorskip("h5py", reason="the data extra is not installed")
    write_shd(folder)
    with h5py.File(folder / "shd_train.h5", "a") as file:
        for name, change in (("labels", labels), ("spikes/times", times), ("spikes/units", units)):
            if change is not None:
                del file[name]
                change(h5py, file, name)
    return folder


def put(data, dtype=None):
    return lambda h5py, file, name: file.create_dataset(name, data=data, dtype=dtype)


def rows(values, dtype="f8"):
    def write(h5py, file, name):
        data = file.create_dataset(name, (6,), h5py.vlen_dtype(np.dtype(dtype)))
        for k in range(6):
            data[k] = np.array(values, dtype)

    return write


def declared(shape, dtype="f8"):
    return lambda h5py, file, name: file.create_dataset(name, shape, dtype, chunks=(1 << 16,))


@pytest.mark.parametrize("time", [np.nan, np.inf, -1e-3, -np.inf, 1e15, 1e300])
def test_a_spike_at_an_impossible_time(tmp_path, time):
    shd(tmp_path, times=rows([0.1, time]), units=rows([1, 2], "u2"))
    with refused("shd_train.h5", "has a spike at"):
        load_spikes("shd", tmp_path)
    with refused("shd_train.h5", "has a spike at"):
        SpikeFile(tmp_path / "shd_train.h5")


CHANGED = {
    "units that are fractions": {"times": rows([0.1, 0.2]), "units": rows([1, 2.5])},
    "units that are NaN": {"times": rows([0.1, 0.2]), "units": rows([1, np.nan])},
    "units that are negative": {"times": rows([0.1, 0.2]), "units": rows([1, -1], "i4")},
    "units beyond int64": {"times": rows([0.1, 0.2]), "units": rows([1, 2**63], "u8")},
    "times that are complex": {"times": put(np.zeros((6, 2), complex)), "units": rows([1, 2], "u2")},
    "times that are text": {"times": put(np.array([b"a"] * 6))},
    "times that are one number": {"times": put(0.5)},
    "times that are numbers": {"times": put(np.zeros(6))},
    "times in three dimensions": {"times": put(np.zeros((6, 2, 2))), "units": rows([1, 2], "u2")},
    "times that are a group": {"times": lambda h5py, file, name: file.create_group(name)},
    "labels that are fractions": {"labels": put(np.full(6, 1.5))},
    "labels that are NaN": {"labels": put(np.full(6, np.nan))},
    "labels that are negative": {"labels": put(np.full(6, -1))},
    "labels beyond int64": {"labels": put(np.full(6, 2**64 - 1, np.uint64))},
    "labels that are text": {"labels": put(np.array([b"a"] * 6))},
    "labels in two dimensions": {"labels": put(np.zeros((6, 1), int))},
    "labels that are one number": {"labels": put(3)},
    "fewer labels": {"labels": put(np.zeros(5, int))},
    "as many as no memory holds": {key: declared((2**40,)) for key in ("labels", "times", "units")},
}


@pytest.mark.parametrize("what", CHANGED)
def test_hdf5_files_of_another_kind(tmp_path, what):
    shd(tmp_path, **CHANGED[what])
    with refused("shd_train.h5"):
        load_spikes("shd", tmp_path)
    with refused("shd_train.h5"):
        SpikeFile(tmp_path / "shd_train.h5")


@pytest.mark.parametrize("dt", [1e-50, 1e-30, 1e30])
def test_recorded_spikes_in_steps_of_any_length(tmp_path, dt):
    shd(tmp_path, times=rows([0.0, 0.1]), units=rows([1, 2], "u2"))
    assert load_spikes("shd", tmp_path, steps=3, dt=dt).train.ends[0].tolist() == [2 if dt > 1 else 1] * 3


def test_whole_numbers_as_floats_and_rows_of_one_length_are_taken(tmp_path):
    shd(tmp_path, times=put(np.full((6, 2), 0.1)), units=rows([1.0, 2.0]), labels=put(np.arange(6.0)))
    found = load_spikes("shd", tmp_path, steps=10, dt=0.05).train
    assert found.labels.tolist() == list(range(6))
    assert found.ends[:, -1].tolist() == [2] * 6


@pytest.mark.parametrize("kind", [".gz", ".zip"])
def test_a_packed_file_is_unpacked_with_a_bound(tmp_path, tight, monkeypatch, kind):
    pytest.importorskip("h5py", reason="the data extra is not installed")
    write_shd(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "shd_train.h5").unlink()
    path = tmp_path / f"shd_train.h5{kind}"
    if kind == ".gz":
        path.write_bytes(gzip.compress(bytes(10**8)))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("shd_train.h5", bytes(10**8))
    with refused(f"shd_train.h5{kind}", "would unpack to"):
        load_spikes("shd", tmp_path)


def test_a_folder_for_unpacking_without_room_is_named(tmp_path, monkeypatch):
    pytest.importorskip("h5py", reason="the data extra is not installed")
    write_shd(tmp_path)
    path = tmp_path / "shd_train.h5"
    (tmp_path / "shd_train.h5.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuses():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for temporary in (Full, refuses):
        monkeypatch.setattr(tempfile, "TemporaryFile", temporary)
        with pytest.raises(
            FileError, match=r"shd_train.h5.gz cannot be unpacked into .*No space left.*TMPDIR"
        ):
            load_spikes("shd", tmp_path)


# --- images ---


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    "shape", [(2**31 - 1, 2**31 - 1, 2**31 - 1), (7, 40_000, 40_000), (2**31 - 1, 4, 4), (-1, 4, 4)]
)
def test_an_image_file_that_declares_more_than_it_holds(tmp_path, shape, packed):
    write_set(tmp_path, zipped=packed)
    data = struct.pack(">4i", IMAGES, *shape) + bytes(112)
    path = tmp_path / ("train-images-idx3-ubyte.gz" if packed else "train-images-idx3-ubyte")
    path.write_bytes(gzip.compress(data) if packed else data)
    with refused(path.name):
        load_images("mnist", tmp_path)


def test_an_image_file_that_holds_more_than_it_declares(tmp_path, tight):
    write_set(tmp_path, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(IMAGES, np.zeros((7, 4, 4))) + bytes(10**8)))
    with refused(path.name, "more than 112 bytes"):
        load_images("mnist", tmp_path)


def test_a_cifar_archive_that_unpacks_to_more_than_images(tmp_path, tight):
    write_cifar(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        arrays = dict(file) | {"train_x": np.zeros((4000, 3, 32, 32), np.uint8)}
    np.savez_compressed(tmp_path / "cifar10.npz", **arrays)
    with refused("cifar10.npz", "would unpack to"):
        load_images("cifar10", tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"train_x": np.array([None] * 5)},
        {"train_y": np.array([None] * 5)},
        {"train_y": np.full(5, -1)},
        {"train_y": np.full(5, 2**63, np.uint64)},
        {"train_y": np.full(5, np.nan)},
        {"train_y": np.array(["1"] * 5)},
        {"train_y": np.zeros(5, bool)},
        {"train_x": np.array(3, np.uint8)},
        {"train_x": np.zeros((0, 3, 32, 32), np.uint8), "train_y": np.zeros(0, int)},
    ],
)
def test_cifar_arrays_of_another_kind(tmp_path, change):
    write_cifar(tmp_path / "cifar10.npz", **change)
    with pytest.raises(InputError):
        load_images("cifar10", tmp_path)


def test_a_folder_in_the_place_of_a_file(tmp_path):
    write_set(tmp_path, zipped=False)
    path = tmp_path / "ibmGestureTrain" / "user1" / "0.npy"
    gestures(tmp_path, events(3.0))
    path.unlink()
    path.mkdir()
    with refused("0.npy"):
        load_spikes("dvs-gesture", tmp_path)
