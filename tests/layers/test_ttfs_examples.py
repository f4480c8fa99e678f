"""The examples, at a size where they take a moment, on files made here in the format they read."""

import gzip
import runpy
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import torch_threads

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *(str(a) for a in arguments)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_digits_learn(monkeypatch, capsys, tmp_path):
    pytest.importorskip("sklearn")
    run(monkeypatch, "ttfs_digits", "--epochs", 8, "--save", tmp_path / "net.pt")
    out = capsys.readouterr().out
    accuracy = float(out.split("epoch 8: ")[1].split("test accuracy ")[1].split(" %")[0])
    assert accuracy > 95
    assert "100.00000 % of 69120 spike times equal (0 differ) on the exact grid" in out
    assert "same class as without early firing" in out
    assert (tmp_path / "net.pt").is_file()


def test_fashion_mnist_runs(monkeypatch, capsys, tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 60), ("t10k", 20)):
        x, y = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8), rng.integers(0, 10, n).astype(np.uint8)
        images = struct.pack(">4i", 0x803, *x.shape) + x.tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, n) + y.tobytes())
    run(monkeypatch, "ttfs_fashion_mnist", "--root", tmp_path, "--epochs", 1, "--width", 4)
    out = capsys.readouterr().out
    assert "epoch 1: test accuracy" in out
    assert "(0 differ) on the exact grid" in out


@pytest.mark.parametrize("depth", [9, 16])
def test_cifar_runs(monkeypatch, capsys, tmp_path, depth):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 24), ("test", 6)):
        arrays[f"{part}_x"] = rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8)
        arrays[f"{part}_y"] = rng.integers(0, 10, n)
    np.savez(tmp_path / "cifar10.npz", **arrays)
    run(
        monkeypatch,
        "ttfs_cifar",
        "--root",
        tmp_path,
        "--depth",
        depth,
        "--width",
        0.05,
        "--epochs",
        2,
        "--batch",
        12,
        "--tb",
        1e-3,
    )
    out = capsys.readouterr().out
    assert "epoch 2: loss" in out
    layers = {9: 8, 16: 15}[depth]
    assert f"{32 * (1 + layers)} steps" in out
