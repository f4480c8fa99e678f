"""What the check for machines with a GPU reports: tests by op, the table, and an earlier run beside it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu_check
from gpu import checks, report

# --- the tests of the ops ---


@pytest.mark.parametrize(
    ("test", "op"),
    [
        ("tests/kernels/test_gpu.py::TestGpu::test_large_shapes[100-64-200]", "layer"),
        ("tests/kernels/test_gpu.py::TestGpu::test_large_recurrent[127]", "recurrent"),
        ("tests/kernels/test_gpu.py::TestGpuTtfsEvents::test_one", "ttfs"),
        ("tests/kernels/test_gpu.py::TestGpuEPropScan::test_one", "eprop"),
        ("tests/kernels/test_gpu_graphs.py::test_a_captured_training_step_learns", "graph"),
    ],
)
def test_the_op_of_a_test(test: str, op: str) -> None:
    assert checks.op_of(test) == op


def test_outcomes_are_handed_on_as_tests_end() -> None:
    rows: list[dict] = []
    plugin = checks.Outcomes(rows.append)

    def ended(when: str, outcome: str) -> SimpleNamespace:
        flags = {name: name == outcome for name in ("passed", "failed", "skipped")}
        return SimpleNamespace(nodeid="a::test_ttfs", when=when, outcome=outcome, longrepr="E  no", **flags)

    for when, outcome in (
        ("setup", "passed"),
        ("call", "failed"),
        ("teardown", "passed"),
        ("setup", "skipped"),
    ):
        plugin.pytest_runtest_logreport(ended(when, outcome))
    plugin.pytest_runtest_logreport(ended("call", "passed"))
    assert [row["outcome"] for row in rows] == ["failed", "skipped", "passed"]
    assert rows[0]["why"] == "E  no"


# --- the report ---


def written(path: Path, wall: float = 2.0) -> report.Report:
    made = report.Report(path, {"device": "H", "commit": "c"})
    outcomes = [("layer", "passed"), ("ttfs", "failed"), ("graph", "passed")]
    made.add(
        "tests", [{"test": f"test of {op}", "op": op, "outcome": how, "why": "no"} for op, how in outcomes]
    )
    net = {"row": "net", "figures": ["wall", "graph"], "ops": ["layer"]}
    made.add("network", [net | {"provider": "sparse", "role": "ours", "wall_ms": {"median": wall}}])
    made.add("network", [net | {"provider": "sparse", "role": "ours", "graph_ms": {"median": 1.0}}])
    made.add("network", [net | {"provider": "fast", "role": "peer", "wall_ms": {"median": 3.0}}])
    made.add("network", [net | {"provider": "slow", "role": "peer", "wall_ms": {"median": 9.0}}])
    ttfs = {"row": "ttfs", "provider": "TTFS", "role": "ours", "figures": ["wall", "graph"], "ops": ["ttfs"]}
    made.add("faces", [ttfs | {"wall_ms": {"median": 1.0}, "graph_error": "cannot be captured"}])
    scan = {"row": "scan", "provider": "forward", "role": "ours", "figures": ["share"], "ops": ["layer"]}
    made.add("scan", [scan | {"share_of_copy": 0.5}])
    made.add("scan", [scan | {"row": "scan 2", "failed": "RuntimeError: illegal"}])
    return made


def test_a_failing_test_marks_its_op_and_keeps_the_rest(tmp_path: Path) -> None:
    written(tmp_path / "gpu.json")
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert data["tests"]["state"] == "failed"
    assert data["rows"]["network"][0]["tests"] == "ok"
    assert data["rows"]["faces"][0]["tests"] == "1 of ttfs failed"
    assert data["graphs"] == {"captured": ["net: sparse"], "failed": {"ttfs: TTFS": "cannot be captured"}}
    lines = {(line["row"], line["figure"]): line for line in report.lines(data)}
    assert lines["net", "wall"]["ratio"] == 1.5
    assert lines["net", "wall"]["peer"] == "fast"
    assert lines["net", "graph"]["peer"] == "fast, wall"  # none was captured: the fastest there is
    assert lines["ttfs", "wall"]["note"] == "1 of ttfs failed"
    assert lines["ttfs", "graph"]["note"] == "cannot be captured"
    assert lines["scan 2", ""]["note"] == "RuntimeError: illegal"


def test_against_an_earlier_run(tmp_path: Path) -> None:
    written(tmp_path / "earlier.json", wall=4.0)
    before, old = report.earlier(tmp_path / "earlier.json")
    now = report.compared(list(report.lines(written(tmp_path / "gpu.json").data)), old)
    ratios = {(line["row"], line["figure"]): line.get("earlier_ratio") for line in now}
    assert before["device"] == "H"
    assert ratios["net", "wall"] == 2.0
    assert ratios["scan", "share"] == ratios["net", "graph"] == 1.0
    assert ratios["ttfs", "graph"] is ratios["scan 2", ""] is None


@pytest.mark.parametrize("text", ["", "[]", '{"rows": {"network": [{"provider": "sparse"}]}}'])
def test_a_file_that_is_no_report(tmp_path: Path, text: str, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "old.json").write_text(text)
    options = ["--device", "cpu", "--small", "--against", str(tmp_path / "old.json")]
    assert gpu_check.main(options) == 2
    assert "no report of this script" in capsys.readouterr().err


def test_the_whole_command(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    out = tmp_path / "gpu.json"
    options = ["--out", str(out), "--device", "cpu", "--small", "--parts", "scan", "--no-compile"]
    written(tmp_path / "earlier.json")
    assert gpu_check.main([*options, "--against", str(tmp_path / "earlier.json")]) == 0
    data = json.loads(out.read_text())
    assert len(data["rows"]["scan"]) == 6
    assert data["skipped"] == {}
    assert data["versions"]["torch"] == torch.__version__
    assert len(data["summary"]) == 4
    shown = capfd.readouterr().out
    assert "of a copy" in shown
    assert "the earlier run was on another device: H" in shown
