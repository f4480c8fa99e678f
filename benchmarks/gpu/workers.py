"""Processes: the children that measure, and the parent that waits for them, keeps their rows and stops them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from . import checks
from .clock import DeviceLost, OutOfTime, Run
from .compare import Row, why
from .parts import jobs

DOOR = Path(__file__).resolve().parents[1] / "gpu_check.py"
# SpikingJelly 2 chooses its kernels by this variable when it is imported
SPIKINGJELLY = {"SJ_LIF_CUDA_IMPLEMENTATION": "triton"}
LATE, LOST = 3, 4  # exit statuses: out of time; the device answers no more
GRACE = 10.0  # seconds for libraries to be imported, and for one measurement more than fits
_POLL = 0.2


# --- the child's side ---


def measure(parts: list[str], run: Run, rows: Path, after: int, limits: dict[str, float]) -> int:
    """Write every row as a line of JSON, from job ``after`` of the first part on, and what was begun and done.

    A part that takes longer than its limit is left between two measurements.
    """
    torch.set_num_threads(run.sizes.threads)
    end = run.deadline
    with rows.open("a") as out:

        def emit(row: Row) -> None:
            out.write(json.dumps(row) + "\n")
            out.flush()

        for part in parts:
            begin, late = time.monotonic(), False
            run.deadline = min(end, begin + limits[part])
            for k, (name, job) in enumerate(jobs(part, run.sizes, run.device).items()):
                if part == parts[0] and k < after:
                    continue
                emit({"begun": part, "job": k, "name": name})
                head = {"part": part, "row": name, "provider": "", "role": "ours"}
                try:
                    run.hurry()
                    for row in job(run):
                        emit({"part": part} | row)
                    run.still_there()
                except OutOfTime:
                    late = True
                    break
                except DeviceLost as error:
                    emit(head | {"failed": f"the device is lost: {error}"[:500]})
                    return LOST
                except Exception as error:
                    emit(head | why(error))
                    run.still_there()
            emit({"done": part, "seconds": round(time.monotonic() - begin, 1), "late": late})
    return 0


def test(run: Run, rows: Path) -> int:
    """Write a row for each check that ended."""
    with rows.open("a") as out:

        def emit(row: Row) -> None:
            out.write(json.dumps(row) + "\n")
            out.flush()

        for row in checks.backends():
            emit(row)
        checks.gpu_tests(emit, min(12, os.cpu_count() or 1) if run.on_gpu else 1)
    return 0


def compile_share(run: Run, parts: list[str], rows: Path, share: int, of: int) -> int:
    """Run every ``of``-th job once over few steps: its kernels go to Triton's cache on disk."""
    torch.set_num_threads(1)
    sizes = run.sizes.short()
    everything = [(part, *job) for part in parts for job in jobs(part, sizes, run.device).items()]
    short = Run(sizes, run.device, run.deadline, warming=True)
    with rows.open("a") as out:
        for part, name, job in everything[share::of]:
            begin, failed = time.monotonic(), []
            try:
                failed = [row["failed"] for row in job(short) if "failed" in row]
            except OutOfTime:
                return LATE
            except Exception as error:
                failed = [f"{type(error).__name__}: {error}"[:500]]
            row = {"part": part, "job": name, "seconds": round(time.monotonic() - begin, 1)}
            out.write(json.dumps(row | ({"failed": failed[0]} if failed else {})) + "\n")
            out.flush()
    return 0


# --- the parent's side ---


@contextmanager
def started(options: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """This script with other options, in a group of its own that does not outlive the block."""
    command = [sys.executable, str(DOOR), *options]
    child = subprocess.Popen(command, env=os.environ | SPIKINGJELLY, start_new_session=True)
    try:
        yield child
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


class Tail:
    """New whole lines of a file that a child writes."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0
        path.touch()

    def read(self) -> list[Row]:
        with self.path.open("rb") as file:
            file.seek(self.at)
            lines, _, _ = file.read().rpartition(b"\n")
        if not lines:
            return []
        self.at += len(lines) + 1
        return [json.loads(line) for line in lines.split(b"\n")]


def run_tests(
    options: list[str], folder: Path, seconds: float, keep: Callable[[str, list[Row]], None]
) -> str:
    """Run the checks; why some are missing, if they are."""
    tail, end = Tail(folder / "tests.rows"), time.monotonic() + seconds
    with started([*options, "--work", "tests", "--rows", str(tail.path)]) as child:
        while child.poll() is None and time.monotonic() < end:
            time.sleep(_POLL)
            if found := tail.read():
                keep("tests", found)
        status = child.poll()
    keep("tests", tail.read())
    return {0: "", None: "out of time: stopped"}.get(status, f"exit status {status}")


class Measuring:
    """The process that measures, and another one where it dies or does not come back from a part."""

    def __init__(
        self, parts: list[str], limits: dict[str, float], keep: Callable[[str, list[Row]], None]
    ) -> None:
        self.todo, self.limits, self.keep = parts, limits, keep
        self.job, self.begun = 0, 0.0  # of the first part to do
        self.seconds: dict[str, float] = {}
        self.skipped: dict[str, str] = {}

    def run(self, options: list[str], folder: Path, end: float) -> None:
        tail = Tail(folder / "measured.rows")
        while self.todo and end - time.monotonic() > 5:
            own = ["--work", "measuring", "--parts", ",".join(self.todo), "--after", str(self.job)]
            own += ["--seconds", f"{end - time.monotonic():.1f}", "--rows", str(tail.path)]
            self.begun, at = time.monotonic(), tail.at
            with started([*options, *own]) as child:
                while child.poll() is None and time.monotonic() < min(end, self._latest()):
                    time.sleep(_POLL)
                    self._take(tail.read())
                status = child.poll()
            self._take(tail.read())
            if status == 0 or not self.todo:
                break
            part = self.todo[0]
            if status is None:
                self._left(part, "out of time: stopped")
            else:
                what = "the device was lost" if status == LOST else f"exit status {status}"
                self._say(part, f"job {self.job}: {what}")
                self.job += 1
                if tail.at == at:  # it did not even begin
                    break
        for part in self.todo:
            self._say(part, "no time left")

    def _latest(self) -> float:
        # it leaves a part by itself between two measurements; one measurement more than that is too much
        return self.begun + GRACE + (1.2 * self.limits[self.todo[0]] if self.todo else 0)

    def _take(self, found: list[Row]) -> None:
        rows: dict[str, list[Row]] = {}
        for row in found:
            if "begun" in row:
                print(f"{row['begun']}: {row['name']}", flush=True)
                if row["job"] == 0:
                    self.begun = time.monotonic()
                self.job = row["job"]
            elif "done" in row:
                self._left(row["done"], "out of time: the last rows are missing" if row["late"] else "")
                self.seconds[row["done"]] = row["seconds"]
            else:
                rows.setdefault(row.pop("part"), []).append(row)
        for part, new in rows.items():
            self.keep(part, new)

    def _left(self, part: str, reason: str) -> None:
        self.seconds[part] = round(time.monotonic() - self.begun, 1)
        self._say(part, reason)
        self.todo, self.job, self.begun = self.todo[1:], 0, time.monotonic()

    def _say(self, part: str, reason: str) -> None:
        said = [self.skipped[part]] if part in self.skipped else []
        if reason:
            self.skipped[part] = "; ".join([*said, reason])


def compile_first(options: list[str], folder: Path, seconds: float, processes: int) -> dict[str, Any]:
    """Compile the kernels of all jobs in parallel; what each took or why it failed."""
    begin = time.monotonic()
    own = [*options, "--work", "compiling", "--seconds", f"{seconds:.1f}", "--of", str(processes)]
    tails = [Tail(folder / f"compiling.{k}.rows") for k in range(processes)]
    with ExitStack() as group:
        children = [
            group.enter_context(started([*own, "--after", str(k), "--rows", str(tail.path)]))
            for k, tail in enumerate(tails)
        ]
        while any(child.poll() is None for child in children) and time.monotonic() < begin + seconds:
            time.sleep(_POLL)
        ended = [child.poll() for child in children]
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "processes": processes,
        "not_done": sum(status != 0 for status in ended),
        "jobs": [row for tail in tails for row in tail.read()],
    }
