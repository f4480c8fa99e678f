"""The check for machines with a GPU, tried without one: every part runs, at sizes that say nothing about speed."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu_check


def small_run(seconds: float = 600.0) -> gpu_check.Run:
    return gpu_check.Run(gpu_check.SMALL, "cpu", time.monotonic() + seconds, Console(quiet=True))


def rows_of(name: str, path: Path, run: gpu_check.Run | None = None) -> list[dict]:
    status = gpu_check.work(name, run or small_run(), path)
    assert status == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_boxes_fit_into_nine_minutes() -> None:
    assert sum(seconds for _, seconds in gpu_check.PARTS.values()) <= 9 * 60 - 10


def test_published_protocol(tmp_path: Path) -> None:
    pytest.importorskip("snntorch")
    rows = rows_of("s3gd", tmp_path / "rows")
    assert {row["provider"] for row in rows} == {"sparse", "snntorch", "indexed"}
    assert {tuple(row["shape"]["layers"]) for row in rows} == {(10, 10), (20, 20)}
    assert len(rows) == 3 * (2 + 1)  # the first width at two activities
    assert all(row["backward_ms"]["median"] > 0 for row in rows)


def test_training_steps_and_missing_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("snntorch", "norse.torch", "spikingjelly.activation_based"):
        monkeypatch.setitem(sys.modules, module, None)
    rows = rows_of("network", tmp_path / "rows")
    skipped = {row["provider"]: row["skipped"] for row in rows if row["skipped"]}
    assert set(skipped) == {"sparse", "sparse-events", "snntorch", "norse", "spikingjelly"}
    assert "pip install norse" in skipped["norse"]
    measured = [row for row in rows if not row["skipped"]]
    assert [row["provider"] for row in measured] == ["sparse-op"] * 2  # it needs none of them
    assert all(row["step_ms"]["median"] > 0 and row["saved_bytes"] > 0 for row in measured)


def test_bandwidth_counts_what_has_to_move(tmp_path: Path) -> None:
    rows = rows_of("scan", tmp_path / "rows")
    assert [row["provider"] for row in rows] == ["copy", "forward", "backward"] * 2
    neuron_steps = 12 * 4 * 33
    assert [row["bytes"] for row in rows[3:]] == [8 * neuron_steps, 8 * neuron_steps, 12 * neuron_steps]
    for row in rows:
        seconds = row["ms"]["median"] / 1e3
        assert row["gigabytes_per_second"] == pytest.approx(row["bytes"] / seconds / 1e9)
        assert 0 < row["spike_rate"] < 0.5
    assert rows[0]["share_of_copy"] == rows[3]["share_of_copy"] == 1


def test_compile_and_density(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("snntorch")
    monkeypatch.setattr(
        torch, "compile", lambda net: net
    )  # that it compiles is not our matter, and takes long
    compiled = rows_of("compile", tmp_path / "compile")
    assert [row["provider"] for row in compiled] == ["sparse-op", "snntorch", "compile"]
    density = rows_of("density", tmp_path / "density")
    assert {"events", "dense", "auto", "snntorch"} <= {row["provider"] for row in density}


def test_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    assert gpu_check.work("scan", small_run(seconds=-1), tmp_path / "rows") == 3
    assert (tmp_path / "rows").read_text() == ""
    status, output = gpu_check.run_child(
        [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 1.0
    )
    assert status == 124
    assert "begun" in output


def test_the_whole_command(tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture) -> None:
    out = tmp_path / "gpu.json"
    options = ["--out", str(out), "--device", "cpu", "--small"]
    monkeypatch.setattr(gpu_check, "run_tests", lambda *_: {"state": "no test ran"})
    assert gpu_check.main([*options, "--parts", "tests,scan"]) == 0
    report = json.loads(out.read_text())
    assert len(report["rows"]["scan"]) == 6
    assert report["skipped"] == {"tests": "no test ran"}
    assert "% of a copy" in capfd.readouterr().out
    monkeypatch.setattr(gpu_check, "run_tests", lambda *_: {"state": "failed", "output": "1 failed"})
    assert gpu_check.main([*options, "--parts", "tests,s3gd"]) == 1
    report = json.loads(out.read_text())
    assert report["rows"] == {}
    assert "numbers are right" in report["skipped"]["s3gd"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture) -> None:
    assert gpu_check.main([]) == 2
    assert "--device cpu --small" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "output", "state"),
    [
        (0, "67 passed in 3 s", "ok"),
        (0, "67 skipped in 3 s", "no test ran"),
        (5, "no tests ran", "no test ran"),
        (1, "1 failed, 66 passed", "failed"),
        (124, "......", "out of time"),
    ],
)
def test_what_the_tests_say(monkeypatch: pytest.MonkeyPatch, status: int, output: str, state: str) -> None:
    monkeypatch.setattr(gpu_check, "run_child", lambda *_: (status, output))
    assert gpu_check.run_tests(60, small=True)["state"] == state
