"""Files are whole at any moment; what is read from a small one is bounded; every failure is one line that names it."""

import errno
import gzip
import io
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from snn_sparse_plugin import InputError, SparsePluginError
from snn_sparse_plugin.core.errors import FileError
from snn_sparse_plugin.files import reading, unpack, write_atomic, write_text
from snn_sparse_plugin.files.plain import load_plain


def no_room(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full(monkeypatch):
    """A disk on which nothing has room."""
    monkeypatch.setattr(os, "fsync", no_room)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not sys.platform.startswith("linux") or os.getuid():
        pytest.skip("only root can mount a small file system")
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def one_line(error) -> str:
    lines = str(error.value).splitlines()
    assert len(lines) == 1
    return lines[0]


# --- written whole ---


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path, full):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(FileError) as error:
        write_text(path, "new")
    assert str(path) in one_line(error)
    assert "No space left" in str(error.value)
    assert "make room" in str(error.value)
    assert isinstance(error.value, OSError)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_really_is_full(small_disk):
    path = small_disk / "net.pt"
    write_atomic(path, lambda file: torch.save({"w": torch.zeros(100)}, file))
    before = path.read_bytes()
    with pytest.raises(FileError, match="No space left"):
        write_atomic(path, lambda file: torch.save({"w": torch.zeros(100_000)}, file))
    assert path.read_bytes() == before
    assert list(small_disk.iterdir()) == [path]


def test_what_cannot_be_written_as_this_format_does_not_touch_the_disk(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def fails(file):
        file.write(b"half")
        raise RuntimeError("no such format")

    with pytest.raises(RuntimeError, match="no such format"):
        write_atomic(path, fails)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["a folder", "below a file"])
def test_a_place_where_no_file_can_be(tmp_path, kind):
    (tmp_path / "file").write_text("")
    path = tmp_path if kind == "a folder" else tmp_path / "file" / "a"
    with pytest.raises(FileError, match="cannot be written"):
        write_text(path, "new")


def test_a_link_stays_one_and_a_device_is_written_to(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "through")
    reader.join(10)
    assert read == ["through"]
    assert not pipe.is_file()


def test_several_writers_of_one_file_leave_one_whole(tmp_path):
    path = tmp_path / "a"
    texts = [str(k) * 200_000 for k in range(4)]
    threads = [threading.Thread(target=lambda t=t: [write_text(path, t) for _ in range(10)]) for t in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_the_umask_counts_for_a_file_that_is_moved_into_its_place(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


# --- read ---


@pytest.mark.parametrize(
    "raised",
    [
        KeyError("k\x1b[2J"),
        RuntimeError("a\nb"),
        ValueError("a\x85b"),
        MemoryError(),
        RecursionError("deep"),
        UnicodeDecodeError("u", b"", 0, 1, "r"),
    ],
)
def test_whatever_a_parser_raises_is_one_line_that_names_the_file(raised):
    with pytest.raises(InputError) as error, reading("some/file.x", "a table", "Delete it."):
        raise raised
    assert "some/file.x is not a table, or it is damaged" in one_line(error)
    assert str(error.value).isprintable()
    assert str(error.value).endswith("Delete it.")


def test_a_missing_file_and_an_error_of_this_package(tmp_path):
    with pytest.raises(InputError, match="there is no file of this name"), reading("x", "a table"):
        (tmp_path / "none").read_bytes()
    with pytest.raises(SparsePluginError, match="^said$"), reading("x", "a table"):
        raise SparsePluginError("said")


# --- plain torch files ---


def rewritten(source: Path, target: Path, change, compression=zipfile.ZIP_STORED):
    """A copy of a zip file in which ``change(name, data)`` has replaced the files."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def test_plain_data_comes_back(tmp_path):
    data = {"w": torch.arange(6.0).view(2, 3).t(), "b": [torch.tensor(True), None, (1, 2.5, "x")]}
    data |= {
        f"x{k}": torch.zeros(k, dtype=t) for k, t in enumerate((torch.bfloat16, torch.complex64, torch.int8))
    }
    torch.save(data, tmp_path / "a.pt")
    found = load_plain(tmp_path / "a.pt", "a file")
    assert torch.equal(found["w"], data["w"])
    assert found["b"][1:] == data["b"][1:]
    assert [found[f"x{k}"].dtype for k in range(3)] == [torch.bfloat16, torch.complex64, torch.int8]


def test_a_storage_that_declares_more_than_the_file_holds(tmp_path):
    torch.save({"w": torch.arange(6.0)}, tmp_path / "a.pt")

    def larger(name, data):
        changed = data.replace(b"K\x06tq", b"J\x00\x00\x10\x00tq").replace(
            b"K\x06\x85", b"J\x00\x00\x10\x00\x85"
        )
        assert (changed != data) == name.endswith("data.pkl")
        return changed

    rewritten(tmp_path / "a.pt", tmp_path / "b.pt", larger)
    with pytest.raises(InputError, match=r"b.pt is not a file.*declares 1048576 numbers"):
        load_plain(tmp_path / "b.pt", "a file")


def test_a_plain_file_is_not_unpacked_into_more_than_it_is(tmp_path):
    torch.save({"w": torch.zeros(10**6)}, tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", tmp_path / "b.pt", lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "b.pt").stat().st_size < 100_000
    with pytest.raises(InputError, match=r"b.pt .* is compressed"):
        load_plain(tmp_path / "b.pt", "a file")


class Code:
    def __reduce__(self):
        return os.mkdir, ("made by a file",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_no_code_in_a_file_is_run(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    if form == "pickle":
        Path("a.pt").write_bytes(pickle.dumps(Code()))
    else:
        torch.save({"a": Code()}, "a.pt", _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(InputError, match="is not a file"):
        load_plain("a.pt", "a file")
    assert not Path("made by a file").exists()


# --- arrays and packed files ---


def stored(array, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["f4", ">f8", "u1", "?", "U3", "c8"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_arrays_are_read_as_numpy_reads_them(dtype, shape):
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    for data in (stored(array), stored(np.array(array, order="F"))):
        found = unpack.array(data)
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04",
        stored(np.arange(9.0))[:-1],
        stored(np.arange(9.0)) + b"x",
        stored(np.array([None, 1]), allow_pickle=True),
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}\n"),
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (-8,)}\n") + bytes(64),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n") + pickle.dumps(Code()),
        header("{'descr': '<V0', 'fortran_order': False, 'shape': (1,)}\n"),
        header("(" * 9000),
        header("{'descr': [], 'shape'"),
    ],
    ids=[
        "empty",
        "zip",
        "cut",
        "longer",
        "objects",
        "huge",
        "negative",
        "pickle",
        "void",
        "brackets",
        "half",
    ],
)
def test_bytes_that_are_no_array(data):
    with pytest.raises(ValueError):  # noqa: PT011
        unpack.array(data)


def test_objects_in_an_archive_of_arrays_are_not_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", a=np.arange(3), b=np.array([Code()]))
    assert list(unpack.arrays("a.npz", {"a"}.__contains__)) == ["a"]
    with pytest.raises(ValueError, match="Python objects"):
        unpack.arrays("a.npz")
    assert not Path("made by a file").exists()


@pytest.fixture
def tight(monkeypatch):
    """A bound that a test reaches without gigabytes."""
    monkeypatch.setattr(unpack, "_FREE", 1 << 16)


def test_archives_that_unpack_to_more_than_data_does(tmp_path, tight):
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(10**7))
    with pytest.raises(ValueError, match="would unpack to"):
        unpack.arrays(tmp_path / "a.npz")
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "b.npz", b=rng.random(10**5))
    assert len(unpack.arrays(tmp_path / "b.npz")["b"]) == 10**5


def test_a_stream_is_read_up_to_the_bound(tight):
    packed = gzip.compress(bytes(10**8))
    reader = gzip.GzipFile(fileobj=io.BytesIO(packed))
    with pytest.raises(ValueError, match="would unpack to"):
        unpack.read_bounded(reader, len(packed))  # type: ignore[arg-type]
    assert reader.tell() < 2 * unpack.bound(len(packed)) + (1 << 20)
    assert unpack.read_bounded(io.BytesIO(b"abc"), 3) == b"abc"
    assert unpack.read_bounded(io.BytesIO(b"abc"), 3, at_most=2) == b"ab"
