"""Readers of damaged files, each in a process of its own, so that a crash is a failure: see ``file_fuzz.py``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from file_fuzz import READERS

QUICK = (
    "network-dense",
    "network-image",
    "spike-times",
    "idx-gz",
    "gesture",
    "n-mnist",
    "checkpoint",
    "results",
)


def run(readers: tuple[str, ...], first: int, count: int, timeout: float) -> None:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(here / "file_fuzz.py"), str(first), str(count), *readers],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"exit code {done.returncode} at\n{done.stderr[-3000:]}"
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == list(readers)
    assert all(int(line.split()[1]) < count for line in lines), "nothing was damaged"


def test_damaged_files_are_read_sanely_or_refused():
    run(QUICK, 0, 25, 300)


def test_damaged_hdf5_files_are_read_sanely_or_refused():
    pytest.importorskip("h5py", reason="the data extra is not installed")
    run(("hdf5", "hdf5-packed"), 0, 25, 300)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_many_damaged_files_are_read_sanely_or_refused(reader):
    if reader.startswith("hdf5"):
        pytest.importorskip("h5py", reason="the data extra is not installed")
    run((reader,), 10_000, 1500, 1800)
