"""Everything that needs a GPU, in one command and in under nine minutes.

python benchmarks/gpu_check.py [--out benchmarks/results/gpu.json] [--minutes 9] [--parts tests,s3gd]

Parts, each in a process of its own that is stopped when its time is over; rows are kept as they come:

check    every backend against the reference
tests    the tests marked gpu; where one fails, no speed is measured
s3gd     the published protocol, T = 500, B = 256, N = 200…1000: backward of layer 2 against the dense loop
network  training steps against snnTorch's loop, Norse and SpikingJelly (its Triton kernels), and peak memory
scan     bytes per second of the neuron kernels, against a device copy measured at the same size
compile  training steps against torch.compile of snnTorch's loop
density  one layer over input density: where dense wins

What is not installed, fails or does not fit into its time is listed under ``skipped`` with the reason. --device cpu
--small runs every part at sizes that say nothing about speed, to check this script where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from snn_sparse_plugin.bench import BenchOptions, run_network, run_s3gd, run_sweep
from snn_sparse_plugin.bench.measure import Spread, run_step
from snn_sparse_plugin.bench.problem import Config
from snn_sparse_plugin.bench.providers import setup
from snn_sparse_plugin.core.dynamics import NeuronParams
from snn_sparse_plugin.core.errors import SparsePluginError
from snn_sparse_plugin.core.surrogates import Surrogate
from snn_sparse_plugin.core.version import commit, installed
from snn_sparse_plugin.interfaces.doctor import diagnose
from snn_sparse_plugin.ops.spiking_layer import spiking_layer

ROOT = Path(__file__).resolve().parent.parent
NETWORK = ("sparse", "sparse-events", "sparse-op", "snntorch", "norse", "spikingjelly")
LIBRARIES = ("snntorch", "norse", "spikingjelly", "triton")
# SpikingJelly 2 chooses its kernels by this variable when it is imported
SPIKINGJELLY = {"SJ_LIF_CUDA_IMPLEMENTATION": "triton"}


class OutOfTime(Exception):
    """The rest of a part does not fit."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is. ``scan`` is (T, B, N...) with N from the smallest to the largest that fits."""

    steps: int
    batch: int
    widths: tuple[int, ...]
    network: tuple[int, ...]
    compiled: tuple[int, ...]
    scan: tuple[int, int, tuple[int, ...]]
    densities: tuple[float, ...]
    rounds: int
    threads: int
    config: Config


FULL = Sizes(
    steps=500,
    batch=256,
    widths=(200, 400, 600, 800, 1000),
    network=(100, 500),
    compiled=(25, 100),
    scan=(500, 256, (200, 1000, 4000)),
    densities=(0.005, 0.02, 0.1, 0.5),
    rounds=5,
    threads=2,
    config=Config(),
)
SMALL = Sizes(
    steps=12,
    batch=4,
    widths=(10, 20),
    network=(8, 12),
    compiled=(5,),
    scan=(12, 4, (20, 33)),
    densities=(0.1, 0.5),
    rounds=1,
    threads=1,
    config=Config(inputs=30, layers=(20, 15, 5), batch=4, density=0.1, rate=0.06),
)


@dataclass
class Run:
    """What a part is given: sizes, device, and until when it may go on."""

    sizes: Sizes
    device: str
    deadline: float
    console: Console

    def hurry(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def options(self, providers: tuple[str, ...]) -> BenchOptions:
        # peak memory on CPU takes a process per provider; `snn-sparse bench` measures it
        peak = self.device != "cpu"
        return BenchOptions(
            providers=providers,
            rounds=self.sizes.rounds,
            device=self.device,
            peak=peak,
            threads=self.sizes.threads,
        )

    def able(
        self, config: Config, providers: tuple[str, ...]
    ) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        """Rows of the providers that cannot run here, with the reason, and those that can."""
        skipped, able = [], []
        for name in providers:
            try:
                run_step(setup(replace(config, steps=3, batch=2), name))
                self.sync()
                able.append(name)
            except Exception as error:  # another library fails in its own way
                reason = (
                    str(error) if isinstance(error, SparsePluginError) else f"{type(error).__name__}: {error}"
                )
                skipped.append({"provider": name, "skipped": reason[:500]})
        return skipped, tuple(able)

    def sync(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def check(run: Run) -> Iterator[dict[str, Any]]:
    found = diagnose()
    yield from ({"op": "check", **backend} for backend in found["backends"])
    if not found["ok"]:
        raise SparsePluginError("a backend does not compute what the reference does")


def s3gd(run: Run) -> Iterator[dict[str, Any]]:
    sizes = run.sizes
    for k, n in enumerate(sizes.widths):
        base = replace(
            sizes.config,
            op="s3gd",
            layers=(n, n),
            steps=sizes.steps,
            batch=sizes.batch,
            window=0.2,
            device=run.device,
        )
        skipped, able = run.able(base, ("sparse", "snntorch", "indexed"))
        yield from ({"op": "s3gd", **row} for row in skipped)
        # both activities of `snn-sparse bench --protocol s3gd` once, then that of the publication
        rates = (0.03, 0.003) if k == 0 else (0.003,)
        for rate in rates:
            run.hurry()
            yield from run_s3gd(run.options(able), run.console, sizes.steps, base, rates=(rate,))


def network(run: Run) -> Iterator[dict[str, Any]]:
    base = replace(run.sizes.config, device=run.device)
    skipped, able = run.able(base, NETWORK)
    yield from ({"op": "network", **row} for row in skipped)
    for steps in run.sizes.network:
        run.hurry()
        for row in run_network(run.options(able), run.console, (steps,), base):
            yield row | ({"environment": SPIKINGJELLY} if row["provider"] == "spikingjelly" else {})


def compiled(run: Run) -> Iterator[dict[str, Any]]:
    base = replace(run.sizes.config, device=run.device)
    skipped, able = run.able(base, ("sparse-op", "snntorch"))
    yield from ({"op": "network", **row} for row in skipped)
    for steps in run.sizes.compiled:
        run.hurry()
        yield from run_network(run.options((*able, "compile")), run.console, (steps,), base)


def density(run: Run) -> Iterator[dict[str, Any]]:
    base = replace(run.sizes.config, op="layer", layers=run.sizes.config.layers[:1], device=run.device)
    skipped, able = run.able(base, ("events", "dense", "auto", "snntorch", "norse", "spikingjelly"))
    yield from ({"op": "layer", **row} for row in skipped)
    run.hurry()
    yield from run_sweep("density", run.options(able), run.console, run.sizes.densities, base)


def scan(run: Run) -> Iterator[dict[str, Any]]:
    """The neurons of a layer alone, on a given current, forward and backward.

    Counted are the bytes that have to move, in float32: the current in and the spikes out; and for the backward the
    current and the spikes' gradient in and the current's gradient out. State, checkpoints and scratch come on top.
    """
    T, B, widths = run.sizes.scan
    for n in widths:
        run.hurry()
        size = 4 * T * B * n
        if run.device != "cpu" and 8 * size > torch.cuda.mem_get_info()[0]:
            yield {"op": "scan", "shape": [T, B, n], "skipped": f"{8 * size} bytes do not fit on the device"}
            continue
        current = (0.3 * torch.randn(T, B, n, device=run.device)).requires_grad_()
        grad, target = torch.randn_like(current), torch.empty_like(current)
        options: dict[str, Any] = {
            "params": NeuronParams(mem=0.9),
            "surrogate": Surrogate("fast_sigmoid", (100.0,)),
            "backprop_threshold": 0.2,
            "min_active": 0,
        }

        def copy(current=current, target=target) -> None:
            target.copy_(current.detach())

        @torch.no_grad()
        def forward(current=current, options=options) -> None:
            spiking_layer(current, **options)

        spikes = spiking_layer(current, **options).spikes

        def backward(spikes=spikes, current=current, grad=grad) -> None:
            torch.autograd.grad(spikes, current, grad, retain_graph=True)

        moved = {"copy": 2 * size, "forward": 2 * size, "backward": 3 * size}
        copied = None
        for name, work in (("copy", copy), ("forward", forward), ("backward", backward)):
            spread = _timed(run, work)
            rate = moved[name] / (spread.median * 1e-3)
            copied = copied or rate
            yield {
                "op": "scan",
                "provider": name,
                "shape": [T, B, n],
                "ms": spread._asdict(),
                "bytes": moved[name],
                "gigabytes_per_second": rate / 1e9,
                "share_of_copy": rate / copied,
                "spike_rate": float(spikes.detach().mean()),
            }


def _timed(run: Run, work: Callable[[], None], repeats: int = 10) -> Spread:
    """Milliseconds of one call: several are queued between two looks at the clock, which hides their launches."""
    for _ in range(3):
        work()
    seconds = []
    for _ in range(2 * run.sizes.rounds):
        run.sync()
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        run.sync()
        seconds.append((time.perf_counter() - begin) / repeats)
    return Spread.of(seconds)


# each part with the seconds it may take; together less than nine minutes
PARTS: dict[str, tuple[Callable[[Run], Iterator[dict[str, Any]]] | None, float]] = {
    "check": (check, 40),
    "tests": (None, 140),
    "s3gd": (s3gd, 100),
    "network": (network, 90),
    "scan": (scan, 30),
    "compile": (compiled, 80),
    "density": (density, 40),
}


def work(name: str, run: Run, rows: Path) -> int:
    """The child's side: every row of a part as a line of JSON, the last one of status 3 if time ran out."""
    part = PARTS[name][0]
    assert part is not None
    with rows.open("a") as out:
        try:
            for row in part(run):
                out.write(json.dumps(row) + "\n")
                out.flush()
        except OutOfTime:
            return 3
    return 0


def run_child(command: list[str], seconds: float) -> tuple[int, str]:
    """Exit status (124: stopped when its time was over) and output of a command."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | SPIKINGJELLY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(1.0, seconds),
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        return 124, output.decode(errors="replace") if isinstance(output, bytes) else output
    return done.returncode, done.stdout


def run_tests(seconds: float, small: bool) -> dict[str, Any]:
    """The tests marked gpu; ``"state"`` is ok, failed, or the reason why they say nothing."""
    if find_spec("pytest") is None:
        return {"state": "pytest is not installed"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "tests/kernels/test_gpu.py" if small else "tests",
    ]
    if not small and find_spec("xdist") is not None:
        command += ["-n", "4"]
    status, output = run_child(command, seconds)
    # 5: nothing was collected, as without a device
    meaning = {0: "ok", 5: "no test ran", 124: "out of time"}.get(status, "failed")
    if status == 0 and "passed" not in output:
        meaning = "no test ran"
    return {"state": meaning, "status": status, "output": output[-2000:]}


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    sizes = SMALL if args.small else FULL
    if args.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA or ROCm device here; --device cpu --small tries this script", file=sys.stderr)
        return 2
    if args.part:  # the child's side
        run = Run(sizes, args.device, time.monotonic() + args.seconds, Console(width=120))
        return work(args.part, run, args.rows)

    deadline = time.monotonic() + 60 * args.minutes - 10
    report: dict[str, Any] = {
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        "capability": None if args.device == "cpu" else torch.cuda.get_device_capability(),
        "small": args.small,
        "versions": {"torch": torch.__version__, **{name: installed(name) for name in LIBRARIES}},
        "commit": commit(),
        "tests": None,
        "skipped": {},
        "seconds": {},
        "rows": {},
    }
    failed = False
    for name in args.parts.split(","):
        begin = time.monotonic()
        seconds = min(PARTS[name][1] * args.minutes / 9, deadline - begin)
        print(f"== {name} (up to {seconds:.0f} s)", flush=True)
        if failed:
            report["skipped"][name] = (
                "a check failed: a speed is only worth reporting where the numbers are right"
            )
        elif seconds < 5:
            report["skipped"][name] = "no time left"
        elif name == "tests":
            report["tests"] = run_tests(seconds, args.small)
            failed = report["tests"]["state"] == "failed"
            print(report["tests"].get("output", report["tests"]["state"]), flush=True)
            if report["tests"]["state"] != "ok":
                report["skipped"][name] = report["tests"]["state"]
        else:
            report["rows"][name], why = run_part(name, args, seconds)
            if why:
                report["skipped"][name] = why
                failed |= name == "check"
        report["seconds"][name] = round(time.monotonic() - begin, 1)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")  # whatever happens next
    print(summary(report))
    print(f"written to {args.out}")
    return 1 if failed else 0


def run_part(name: str, args: argparse.Namespace, seconds: float) -> tuple[list[dict[str, Any]], str]:
    """Rows of a part, run in a child, and why some are missing, if they are."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        rows.touch()
        command = [sys.executable, str(Path(__file__)), "--part", name, "--rows", str(rows)]
        # the child stops by itself between two measurements, a little before it is stopped
        command += ["--seconds", f"{0.8 * seconds:.1f}", "--device", args.device]
        status, output = run_child([*command, *(["--small"] if args.small else [])], seconds)
        print(output, flush=True)
        found = [json.loads(line) for line in rows.read_text().splitlines() if line.endswith("}")]
    reasons = {0: "", 3: "out of time: the last rows are missing", 124: "out of time: stopped"}
    return found, reasons.get(status, f"exit status {status}: {output[-500:]}")


def summary(report: dict[str, Any]) -> str:
    """The figures that matter, in a few lines."""
    lines = [f"{report['device']}, commit {report['commit']}, {sum(report['seconds'].values()):.0f} s"]
    for name, baseline, phase in (("s3gd", "snntorch", "backward_ms"), ("network", "snntorch", "step_ms")):
        rows = [row for row in report["rows"].get(name, []) if not row.get("skipped")]
        for row in rows:
            same = ("shape", "layer_rates")
            base = [r for r in rows if r["provider"] == baseline and all(r[k] == row[k] for k in same)]
            ratio = f", {base[0][phase]['median'] / row[phase]['median']:.1f}× {baseline}" if base else ""
            shape = row["shape"]
            lines.append(
                f"{name} T={shape['T']} B={shape['B']} N={shape['layers'][0]} {row['provider']}: {phase[:-3]} "
                f"{row[phase]['median']:.3f} ms{ratio}, {row['saved_bytes_per_neuron_step']} bytes per neuron-step"
            )
    for row in report["rows"].get("scan", []):
        if not row.get("skipped"):
            rate, share = row["gigabytes_per_second"], 100 * row["share_of_copy"]
            lines.append(f"scan {row['shape']} {row['provider']}: {rate:.1f} GB/s, {share:.0f} % of a copy")
    lines += [f"skipped {name}: {reason}" for name, reason in report["skipped"].items()]
    return "\n".join(lines)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after this long")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that say nothing about speed")
    parser.add_argument("--part", choices=[n for n, (f, _) in PARTS.items() if f], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
