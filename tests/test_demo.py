"""The demo, at a size where it takes a moment."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from snn_sparse_plugin import unroll
from snn_sparse_plugin.data import latency_spikes
from snn_sparse_plugin.interfaces.cli import app
from snn_sparse_plugin.interfaces.demo import NETWORKS, DemoOptions, reset, run_demo, step_loop

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.mark.parametrize("library", ["snntorch", "norse"])
def test_demo_trains_and_draws(tmp_path: Path, library: str) -> None:
    pytest.importorskip(library)
    out = tmp_path / "demo.png"
    arguments = (
        f"demo --library {library} --epochs 1 --samples 40 --steps 12 --batch 8 --hidden 9 --json --out {out}"
    )
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert 0 <= found["sparse"]["accuracy"][0] <= 1
    assert found["dense"]["saved_bytes"] > found["sparse"]["saved_bytes"] > 0
    assert found["step_ratio"] > 0
    # before training and after the epoch, two hidden layers
    assert [len(row) for row in found["activity"]["spikes"]] == [2, 2]
    assert all(0 <= value <= 1 for row in found["activity"]["active"] for value in row)
    assert found["options"]["library"] == library


@pytest.mark.parametrize("library", ["snntorch", "norse"])
def test_both_networks_are_the_same_function(library: str) -> None:
    pytest.importorskip(library)
    sizes = (30, 25, 20, 10)
    sparse, dense = (NETWORKS[library](sizes, 3, flag) for flag in (True, False))
    for a, b in zip(sparse.parameters(), dense.parameters(), strict=True):
        assert torch.equal(a, b)
        # on a binary grid every order of summation gives the same current
        with torch.no_grad():
            a.copy_((a * 256).round() / 256)
            b.copy_(a)
    x = latency_spikes(torch.rand(6, 30, generator=torch.Generator().manual_seed(0)), 25, tau=8)
    reset(sparse, library)
    mem = unroll(sparse, x).mem
    reset(dense, library)
    expected = step_loop(dense, x.to_dense(), library)
    assert mem is not None
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(mem, expected, rtol=1e-5, atol=1e-6)


def test_the_seed_decides(tmp_path: Path) -> None:
    pytest.importorskip("snntorch")
    quiet = Console(quiet=True)
    options = {"epochs": 1, "samples": 30, "steps": 12, "batch": 8, "hidden": 7, "out": tmp_path / "demo.png"}
    first, second, other = (run_demo(DemoOptions(**options, seed=seed), quiet) for seed in (1, 1, 2))  # type: ignore[arg-type]
    assert first.activity == second.activity
    assert first.activity != other.activity


@pytest.mark.parametrize("name", ["snntorch_digits", "norse_digits", "sparse_mode_tutorial"])
def test_examples_run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("norse" if name.startswith("norse") else "snntorch")
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--epochs", "1", "--samples", "64"])
    runpy.run_path(str(path), run_name="__main__")
    assert "epoch 1: loss" in capsys.readouterr().out
