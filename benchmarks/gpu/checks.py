"""The checks of every op: each backend against the reference, then the tests marked gpu, a row for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from snn_sparse_plugin.interfaces.doctor import diagnose

from .compare import Row

ROOT = Path(__file__).resolve().parents[2]
# the op a test is of, by the first of these words in its name
OPS = ("ttfs", "eprop", "equation", "graph", "recurrent")


def op_of(test: str) -> str:
    """The op whose speed says nothing where this test fails."""
    return next((op for op in OPS if op in test.lower()), "layer")


def backends() -> Iterator[Row]:
    for backend in diagnose()["backends"]:
        good = backend["state"] in ("ok", "unavailable", "idle")
        outcome = "passed" if good else "failed"
        yield {
            "test": f"doctor: {backend['name']}",
            "op": "layer",
            "outcome": outcome,
            "why": str(backend)[:500],
        }


class Outcomes:
    """A pytest plugin that hands on every test as it ends, also when workers run them."""

    def __init__(self, emit: Callable[[Row], None]) -> None:
        self.emit = emit

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.passed and report.when != "call":
            return
        row = {"test": report.nodeid, "op": op_of(report.nodeid), "outcome": report.outcome}
        if report.failed:
            row["why"] = str(report.longrepr)[-500:]
        self.emit(row)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            row = {"test": report.nodeid, "op": op_of(report.nodeid), "outcome": "failed"}
            self.emit(row | {"why": str(report.longrepr)[-500:]})


def gpu_tests(emit: Callable[[Row], None], processes: int) -> None:
    """The files that hold tests marked gpu; other files are not even collected."""
    if find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed")
    import pytest

    found = sorted((ROOT / "tests").rglob("test_*.py"))
    files = [str(path) for path in found if "mark.gpu" in path.read_text()]
    command = [
        "-q",
        "-m",
        "gpu and not slow",
        "--rootdir",
        str(ROOT),
        "-p",
        "no:cacheprovider",
        "--durations=5",
        *files,
    ]
    if processes > 1 and find_spec("xdist") is not None:
        command += ["-n", str(processes), "--dist", "worksteal"]
    pytest.main(command, plugins=[Outcomes(emit)])
