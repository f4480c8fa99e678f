"""``pytest --snn-sparse[=exact|auto|NUMBER]``: any test suite with sparse mode on.

Collection, fixtures and tests all run inside :func:`~snn_sparse_plugin.sparse_mode`; the end of the run says which
neurons ran sparse, in which way, and why others did not. pytest loads this file in every project of the
environment, so without the option it does nothing and imports nothing but pytest.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ..core.tally import ClassRuns


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("snn-sparse", "sparse spiking networks").addoption(
        "--snn-sparse",
        nargs="?",
        const="auto",
        type=_checked,
        metavar="exact|auto|NUMBER",
        help="run every test in the sparse mode of snn-sparse-plugin: with exact gradients, with those near threshold "
        "only (auto, the default), or with those within NUMBER of the threshold",
    )


def pytest_configure(config: pytest.Config) -> None:
    mode = config.getoption("--snn-sparse")
    if mode is not None:
        config.pluginmanager.register(SparseRun(config, mode), "snn_sparse_run")


def _checked(text: str) -> str:
    if text not in ("exact", "auto"):
        try:
            valid = math.isfinite(float(text)) and float(text) > 0
        except ValueError:
            valid = False
        if not valid:
            # a bare option takes the path that follows it for its value
            raise argparse.ArgumentTypeError(
                f"takes exact, auto or a distance > 0 from the threshold, got {text!r}; "
                f"in front of a path write --snn-sparse=auto"
            )
    return text


class SparseRun:
    """What ``--snn-sparse`` adds to one run of pytest."""

    def __init__(self, config: pytest.Config, mode: str) -> None:
        self.config, self.mode = config, mode
        self.runs: dict[str, ClassRuns] = {}
        threshold = {"exact": None, "auto": "auto"}.get(mode, mode)
        self.options = {"backprop_threshold": threshold if mode in ("exact", "auto") else float(mode)}

    def pytest_report_header(self) -> str:
        return f"snn-sparse: {self.mode}"

    # hookwrapper, the older form, since the plugin is loaded by whichever pytest there is

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_collection(self) -> Iterator[None]:
        yield from self._sparse()

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        yield from self._sparse()

    def _sparse(self) -> Iterator[None]:
        from ..mode import sparse_mode

        with sparse_mode(**self.options):
            yield

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        from ..core import tally

        self._add(tally.by_class())
        sent = getattr(self.config, "workeroutput", None)  # in a worker of pytest-xdist
        if sent is not None:
            sent["snn_sparse"] = {kind: asdict(runs) for kind, runs in self.runs.items()}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        from ..core import tally

        received = getattr(node, "workeroutput", {}).get("snn_sparse", {})
        self._add({kind: tally.ClassRuns(**runs) for kind, runs in received.items()})

    def _add(self, runs: dict[str, ClassRuns]) -> None:
        for kind, more in runs.items():
            if kind in self.runs:
                self.runs[kind].add(more)
            else:
                self.runs[kind] = more

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        from ..core.lines import terminal_width

        terminalreporter.section(f"snn-sparse: {self.mode}")
        for line in summary(self.runs, terminal_width()):
            terminalreporter.line(line)


def summary(runs: dict[str, ClassRuns], width: int | None = None) -> list[str]:
    """The table at the end of a run."""
    from .session import class_table

    return class_table(runs, width)
