"""Everything that needs a GPU, in one command and in eight minutes from an empty cache of kernels.

python benchmarks/gpu_check.py [--out benchmarks/results/gpu.json] [--against EARLIER.json] [--parts tests,network]

First the kernels of all parts are compiled, in parallel processes. Then the parts, those that matter most first, each
in its own time:

tests    every backend against the reference, and the tests marked gpu; a test that fails marks the rows of its op
network  training steps against SpikingJelly (its Triton kernels), snnTorch's loop and Norse
s3gd     the published protocol: backward of layer 2 against the dense loop
faces    what users write: tutorials and loops in sparse_mode(), RLeaky, one call of the op, TTFS, EProp.run
scan     bytes per second of the neuron kernels, against a device copy measured at the same size
memory   peak memory, and the bytes kept for backward
compile  training steps against torch.compile of snnTorch's loop
density  one layer over input density: where dense wins

A row has its eager wall time, the time until Python returned, and for some providers the time on the device and that of
a replayed CUDA graph. The table shows each figure beside the best of the other libraries and, with --against, beside an
earlier run. Rows are written as they come, so that a run that is killed leaves its report. What is not installed,
fails or does not fit says why. --device cpu --small tries everything where there is no GPU, at sizes that say nothing
about speed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu import report as reports
from gpu import workers
from gpu.clock import Run
from gpu.parts import COMPILE_SECONDS, COMPILED_FIRST, MINUTES, PARTS, jobs
from gpu.sizes import FULL, SMALL
from rich.console import Console

from snn_sparse_plugin.core.version import commit, installed

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("snn-sparse-plugin", "snntorch", "norse", "spikingjelly", "triton", "numpy")
RESERVE = 10  # seconds for the table, and for what starts late


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    sizes = SMALL if args.small else FULL
    if args.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA or ROCm device here; --device cpu --small tries this script", file=sys.stderr)
        return 2
    if args.work:
        return _child(args, Run(sizes, args.device, time.monotonic() + args.seconds))
    before: dict[str, Any] | None = None
    old: dict[reports.Key, float] = {}
    if args.against:
        try:
            before, old = reports.earlier(args.against)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are stopped, too
    report = reports.Report(args.out, _head(args, sizes.rounds, sizes.threads))
    with tempfile.TemporaryDirectory() as folder:
        run_parts(args, report, Path(folder))
    now = reports.compared(list(reports.lines(report.data)), old)
    report.data["summary"] = now
    report.write()
    reports.show(report.data, now, before, Console(width=190))
    print(f"written to {args.out}")
    return 1 if report.data["tests"]["state"] == "failed" else 0


def _child(args: argparse.Namespace, run: Run) -> int:
    parts = args.parts.split(",")
    if args.work == "compiling":
        return workers.compile_share(run, parts, args.rows, args.after, args.of)
    if args.work == "tests":
        return workers.test(run, args.rows)
    return workers.measure(parts, run, args.rows, args.after, _limits(args))


def _limits(args: argparse.Namespace) -> dict[str, float]:
    return {part: seconds * args.minutes / MINUTES for part, seconds in PARTS.items()}


def run_parts(args: argparse.Namespace, report: reports.Report, folder: Path) -> None:
    """Compile, then the parts in their order while there is time."""
    end = time.monotonic() + 60 * args.minutes - RESERVE
    options = ["--device", args.device, "--minutes", str(args.minutes), *(["--small"] if args.small else [])]
    data, limits = report.data, _limits(args)
    parts = [part for part in args.parts.split(",") if part != "tests"]

    first = [part for part in COMPILED_FIRST if part in parts]
    if first and args.compile:
        seconds = COMPILE_SECONDS * args.minutes / MINUTES
        print(f"== compiling (up to {seconds:.0f} s)", flush=True)
        sizes = SMALL if args.small else FULL
        count = sum(len(jobs(part, sizes, args.device)) for part in first)
        processes = min(os.cpu_count() or 1, count)
        own = [*options, "--parts", ",".join(first)]
        data["compiled"] = workers.compile_first(own, folder, seconds, processes)
        report.write()
    if "tests" in args.parts.split(","):
        print(f"== tests (up to {limits['tests']:.0f} s)", flush=True)
        begin = time.monotonic()
        if why := workers.run_tests(options, folder, min(limits["tests"], end - begin), report.add):
            data["skipped"]["tests"] = why
        data["seconds"]["tests"] = round(time.monotonic() - begin, 1)
    if parts:
        print(f"== {', '.join(parts)} (up to {end - time.monotonic():.0f} s)", flush=True)
        measuring = workers.Measuring(parts, limits, report.add)
        measuring.run(options, folder, end)
        data["seconds"] |= measuring.seconds
        data["skipped"] |= measuring.skipped


def _head(args: argparse.Namespace, rounds: int, threads: int) -> dict[str, Any]:
    """What has to be known to read the figures."""
    gpu = args.device != "cpu"
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "capability": torch.cuda.get_device_capability() if gpu else None,
        "small": args.small,
        "versions": {"torch": torch.__version__} | {name: installed(name) for name in LIBRARIES},
        "commit": args.commit or commit(),
        "conditions": {
            "dtype": "float32",
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cores": os.cpu_count(),
            "threads": threads,
            "rounds": f"3 to {rounds} of each provider, alternating",
            "minutes": args.minutes,
            "environment": workers.SPIKINGJELLY,
        },
    }


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument(
        "--against", type=Path, help="an earlier report: print the ratio of every figure to it"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="stop after this long")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that say nothing about speed")
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="kernels are cached already"
    )
    parser.add_argument("--commit", help="what is measured, where there is no git")
    parser.add_argument("--work", choices=["tests", "compiling", "measuring"], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--after", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--of", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
