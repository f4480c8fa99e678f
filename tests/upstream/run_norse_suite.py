"""Norse's own test suite, without and with sparse mode: the same tests must fail, and sparse paths must have run.

    python tests/upstream/run_norse_suite.py [exact|auto|NUMBER]

The suite ships inside the installed package. A window may change the gradient that a test looks at, so only
``exact``, the default, is part of the checks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# tests whose outcome is not Norse's alone
DOWNLOADS = "test_vgg11_forward_pretrained", "test_mobilenet_forward_pretrained"  # hundreds of megabytes
FLAKY = {"test_spatial_receptive_field_update_flag": "its input is torch.empty, whatever was in memory"}
RERUNS = 5


class Outcomes:
    """A pytest plugin that keeps how each test went."""

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.tests[report.nodeid] = report.outcome

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.tests[report.nodeid] = "failed"  # e.g. a torchvision that does not fit torch


def child(result: Path, options: list[str]) -> None:
    """Run pytest in this process and leave what happened in a file."""
    import pytest

    from snn_sparse_plugin.core import tally

    outcomes = Outcomes()
    pytest.main(options, plugins=[outcomes])
    runs = {kind: asdict(of_class) for kind, of_class in tally.by_class().items()}
    result.write_text(json.dumps({"tests": outcomes.tests, "runs": runs}))


class Run:
    """The suite, or the tests that ``only`` names, in a process and a directory of their own."""

    def __init__(self, scratch: Path, mode: str | None, only: str = "") -> None:
        spec = find_spec("norse")
        if spec is None or not spec.submodule_search_locations:
            sys.exit("Norse's tests need more than is installed: pip install '.[upstream-tests]'")
        package = Path(next(iter(spec.submodule_search_locations)))
        self.scratch, self.label = scratch, "without sparse mode" if mode is None else f"--snn-sparse={mode}"
        scratch.mkdir()
        (scratch / "empty.ini").write_text("[pytest]\n")  # not the settings of a directory above
        (scratch / "norse").symlink_to(package)  # one test opens a data file by a path relative to it
        options = [
            "-q",
            "-c",
            "empty.ini",
            "--rootdir",
            str(package),
            "-p",
            "no:cacheprovider",
            "--continue-on-collection-errors",
        ]
        options += ["-k", only or " and ".join(f"not {name}" for name in DOWNLOADS), str(package / "torch")]
        if mode is not None:
            options.append(f"--snn-sparse={mode}")
        with (scratch / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--child", "result.json", "--", *options],
                cwd=scratch,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> None:
        self.process.wait()
        result = self.scratch / "result.json"
        if not result.exists():
            sys.exit(f"{self.label}: pytest did not finish\n{self.log()}")
        found = json.loads(result.read_text())
        self.tests, self.runs = found["tests"], found["runs"]
        if not self.tests:
            sys.exit(f"{self.label}: no test ran\n{self.log()}")
        self.failed = {name for name, outcome in self.tests.items() if outcome == "failed"}

    def log(self) -> str:
        return (self.scratch / "log").read_text()

    def __str__(self) -> str:
        counts = Counter(self.tests.values())
        return f"{self.label}: " + ", ".join(f"{counts[k]} {k}" for k in ("passed", "skipped", "failed"))


def without_flaky(run: Run, mode: str | None) -> set[str]:
    """The failed tests, less the flaky ones that pass when repeated."""
    failed = set(run.failed)
    for test in run.failed:
        name = test.rpartition("::")[2]
        for attempt in range(RERUNS if name in FLAKY else 0):
            again = Run(run.scratch / f"{name}-{attempt}", mode, only=name)
            again.wait()
            if not again.failed:
                print(f"  {name} passed when repeated: {FLAKY[name]}")
                failed.remove(test)
                break
    return failed


def compare(mode: str) -> int:
    with tempfile.TemporaryDirectory() as directory:
        plain, sparse = Run(Path(directory) / "plain", None), Run(Path(directory) / "sparse", mode)
        problems = []
        for run in (plain, sparse):
            run.wait()
            print(f"Norse's test suite {run}")
        print(sparse.log()[sparse.log().rindex("== snn-sparse: ") :].partition("\n")[2].partition("\n=")[0])
        if plain.tests.keys() != sparse.tests.keys():
            problems.append(f"different tests ran: {sorted(plain.tests.keys() ^ sparse.tests.keys())}")
        expected, failed = without_flaky(plain, None), without_flaky(sparse, mode)
        for test in sorted(expected):
            print(f"  fails without sparse mode too: {test}")
        problems += [f"fails in sparse mode only: {test}" for test in sorted(failed - expected)]
        problems += [f"fails without sparse mode only: {test}" for test in sorted(expected - failed)]
        calls: Counter[str] = Counter()
        for of_class in sparse.runs.values():
            calls.update(of_class["calls"])
        stepped = "exact" if mode == "exact" else "masked"
        problems += [f"no {way} call" for way in ("fused", stepped, "backward") if not calls[way]]
        if plain.runs:
            problems.append(f"neurons ran sparse without the option: {plain.runs}")
        if failed - expected:
            print(sparse.log())
        print("\n".join(problems) or "the same tests fail")
        return bool(problems)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", nargs="?", default="exact")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help=argparse.SUPPRESS)
    if "--child" in sys.argv:
        child(Path(sys.argv[2]), sys.argv[4:])
    else:
        sys.exit(compare(parser.parse_args().mode))
