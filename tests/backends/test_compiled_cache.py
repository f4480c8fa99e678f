"""Compiled kernels are used again, but not after any source beside them has changed; no folder ends a program."""

import errno
import importlib
import logging
import os
import shutil
import subprocess
import sys
import threading

import pytest
from numba import float32, float64, int64
from numba.core.caching import IndexDataCacheFile

from snn_sparse_plugin.backends.cpu import cache, jit

SOURCE = """
from snn_sparse_plugin.backends.cpu.jit import kernel

@kernel()
def double(x):
    return 2 * x
"""


def test_the_cache_counts_for_one_state_of_all_sources(tmp_path, monkeypatch):
    (tmp_path / "cached_kernel.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)

    def hits():
        sys.modules.pop("cached_kernel", None)
        double = importlib.import_module("cached_kernel").double
        assert double(3) == 6
        return sum(double.stats.cache_hits.values())

    assert hits() == 0
    assert hits() == 1
    monkeypatch.setattr(jit, "sources", lambda: "edited")
    assert hits() == 0
    assert hits() == 1
    monkeypatch.undo()
    sys.modules.pop("cached_kernel", None)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Imports the kernel anew, as another process would, and gives it and the folder of its cache."""
    (tmp_path / "cached_kernel.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(cache, "_told", False)

    def double():
        sys.modules.pop("cached_kernel", None)
        return importlib.import_module("cached_kernel").double

    yield double, tmp_path / "__pycache__"
    sys.modules.pop("cached_kernel", None)


def hits(kernel) -> int:
    return sum(kernel.stats.cache_hits.values())


def stored(folder):
    return sorted(folder.glob("*.nbc"))


def used(double, *numbers) -> int:
    kernel = double()
    for x in numbers:
        assert kernel(x) == 2 * x
    return hits(kernel)


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "a flipped bit": lambda data: data[:-900] + bytes([data[-900] ^ 4]) + data[-899:],
    "text": lambda data: b"not a kernel",
    "another checksum": lambda data: bytes(4) + data[4:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_compiled_anew_and_replaced(fresh, caplog, damage):
    double, folder = fresh
    assert used(double, 3) == 0
    (path,) = stored(folder)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert used(double, 3) == 0
        assert used(double, 3) == 1
    assert not caplog.records
    assert stored(folder) == [path]


def test_a_kernel_under_the_signature_of_another_is_not_run(fresh):
    double, folder = fresh
    assert used(double, 3, 2.5) == 0
    one, other = stored(folder)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert used(double, 3, 2.5) == 0
    assert used(double, 3, 2.5) == 2


def test_a_folder_that_vanishes_is_made_again(fresh):
    double, folder = fresh
    kernel = double()
    shutil.rmtree(folder)
    assert kernel(3) == 6
    assert used(double, 3) == 1


FAILURES = {errno.ENOSPC: "No space left", errno.EROFS: "Read-only", errno.EACCES: "Permission denied"}


@pytest.mark.parametrize("number", FAILURES)
def test_a_folder_that_takes_nothing_is_told_once(fresh, caplog, monkeypatch, number):
    double, folder = fresh

    def fails(self, path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(IndexDataCacheFile, "_open_for_write", fails)
    with caplog.at_level(logging.WARNING):
        assert used(double, 3, 2.5) == 0
        assert used(double, 3) == 0
    (told,) = caplog.messages
    assert FAILURES[number] in told
    assert "NUMBA_CACHE_DIR" in told
    assert str(folder) in told
    assert len(told.splitlines()) == 1


def test_a_cache_without_any_folder_is_told_once(fresh, caplog, monkeypatch):
    double, _ = fresh
    monkeypatch.setattr("numba.core.caching.CompileResultCacheImpl._locator_classes", [])
    with caplog.at_level(logging.WARNING):
        assert used(double, 3) == 0
        assert used(double, 3) == 0
    (told,) = caplog.messages
    assert "NUMBA_CACHE_DIR" in told


def test_a_file_where_the_folder_was(fresh, caplog):
    double, folder = fresh
    kernel = double()
    shutil.rmtree(folder)
    folder.write_text("")
    with caplog.at_level(logging.WARNING):
        assert kernel(3) == 6
    folder.unlink()
    assert len(caplog.messages) == 1


def test_writers_at_once_leave_whole_files(fresh):
    double, folder = fresh
    kernels = [double() for _ in range(4)]
    types = [(int64,), (float32,), (float64,)]
    failed = []

    def compile_all(kernel):
        try:
            for signature in types:
                kernel.compile(signature)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=compile_all, args=(kernel,)) for kernel in kernels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(stored(folder)) == len(types)
    assert not list(folder.glob("*.tmp*"))
    assert used(double, 3, 2.5) == 2


def test_recompiling_throws_the_files_away(fresh):
    double, folder = fresh
    kernel = double()
    assert kernel(3) == 6
    kernel._cache.flush()
    assert not stored(folder)


PROGRAM = """
import torch
from snn_sparse_plugin import NeuronParams
from snn_sparse_plugin.ops import spiking_layer
print(spiking_layer(torch.ones(3, 1, 2), torch.ones(2, 2), params=NeuronParams(.9), backend="cpu").spikes.sum())
"""


def test_a_program_runs_where_the_cache_has_no_room(tmp_path):
    if not sys.platform.startswith("linux") or os.getuid():
        pytest.skip("only root can mount a small file system")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "tensor(6.)"
    assert run.stderr.count("are not cached") == 1
    assert str(tmp_path) in run.stderr
