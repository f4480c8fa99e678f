"""Examples run and learn, in small."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_neuron(capsys):
    runpy.run_path(str(EXAMPLES / "own_neuron.py"), run_name="__main__")
    assert "epoch 30: loss 0.00" in capsys.readouterr().out


def run(monkeypatch, capsys, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("library", ["snntorch", "norse"])
def test_eprop_pattern(monkeypatch, capsys, tmp_path, library):
    picture = tmp_path / "picture.png"
    small = ("--library", library, "--iterations", 12, "--steps", 60, "--picture", picture)
    out = run(monkeypatch, capsys, "eprop_pattern.py", *small)
    before, after = (float(x.split()[0]) for x in out.split("mean squared error ")[1].split(" before, "))
    assert after < 0.7 * before
    assert picture.exists()


@pytest.mark.parametrize("method", ["eprop", "bptt"])
def test_eprop_evidence_and_digits(monkeypatch, capsys, tmp_path, method):
    small = ("--method", method, "--picture", tmp_path / "picture.png")
    out = run(monkeypatch, capsys, "eprop_evidence.py", *small, "--iterations", 2, "--pause", 10, "--cues", 1)
    assert f"{method}: " in out
    out = run(monkeypatch, capsys, "eprop_smnist.py", *small, "--epochs", 1, "--samples", 64, "--hidden", 20)
    assert "epoch 1: loss" in out


def test_eprop_on_recordings_goes_on_where_it_stopped(monkeypatch, capsys, tmp_path):
    h5py = pytest.importorskip("h5py", reason="the data extra is not installed")
    import numpy as np

    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        with h5py.File(tmp_path / f"shd_{part}.h5", "w") as file:
            group, kinds = file.create_group("spikes"), {"times": np.float16, "units": np.uint16}
            for name, dtype in kinds.items():
                data = group.create_dataset(name, (8,), dtype=h5py.vlen_dtype(np.dtype(dtype)))
                for k in range(8):
                    data[k] = np.sort(rng.random(60)) if name == "times" else rng.integers(0, 700, 60)
            file.create_dataset("labels", data=np.arange(8) % 2)
    small = ("--data", tmp_path, "--out", tmp_path / "out", "--hidden", 16, "--dt", 20, "--batch", 4)
    script = "eprop_shd.py"
    run(monkeypatch, capsys, script, *small, "--epochs", 1, "--method", "eprop", "bptt")
    out = run(monkeypatch, capsys, script, *small, "--epochs", 2)
    assert "eprop-0 epoch 2" in out
    assert "eprop-0 epoch 1:" not in out
    assert (tmp_path / "out" / "accuracy.png").exists()


@pytest.mark.parametrize("methods", [("sparse", "snntorch"), ("sparse-norse", "norse")], ids=" ".join)
def test_convolutions_on_recordings(methods, monkeypatch, capfd, tmp_path):
    pytest.importorskip(methods[1])
    for part in ("Train", "Test"):
        for label in (1, 2):
            file = tmp_path / part / str(label) / "00001.bin"
            file.parent.mkdir(parents=True)
            # x, y, polarity and 23 bits of microseconds
            file.write_bytes(bytes(n for k in range(40) for n in (k % 34, label * 9, 0x80, k, 0)))
    small = ("--epochs", 2, "--steps", 6, "--batch", 2, "--channels", 2, 3, "--threads", 1, "--exact")
    out = run(
        *(monkeypatch, capfd, "nmnist_conv.py", "--data", tmp_path, *small),
        *("--method", *methods),
    )
    rows = {line.split()[0]: line.split()[1] for line in out.splitlines()[1:]}
    assert rows[methods[0]] == rows[methods[1]]
