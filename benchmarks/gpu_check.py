"""Everything that needs a GPU, in one command: the tests marked gpu, then the benchmark against the others.

python benchmarks/gpu_check.py [--out benchmarks/results/gpu.json] [--minutes 9]

Writes JSON with device, versions and commit. Stops in time: what did not fit is listed under ``skipped``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
BENCH = [sys.executable, "-m", "snn_sparse_plugin", "bench", "--device", "cuda", "--no-peak", "--rounds", "5"]
RUNS = {
    "network": ["--steps", "100", "--steps", "500"],
    "s3gd": ["--protocol", "s3gd"],
    "density": ["--sweep", "density", "--points", "0.005,0.02,0.1,0.5"],
}


def run(command: list[str], seconds: float) -> tuple[int, str]:
    """Exit status (124: out of time) and output of a command."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, seconds), check=False
        )
    except subprocess.TimeoutExpired:
        return 124, "out of time"
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after this long")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA or ROCm device here: nothing to check", file=sys.stderr)
        return 2

    deadline = time.monotonic() + 60 * args.minutes - 15
    commit = run(["git", "rev-parse", "HEAD"], 10)[1].strip()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "commit": commit,
        "skipped": {},
        "rows": {},
    }
    status, output = run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"], deadline - time.monotonic()
    )
    report["tests"] = {"status": status, "summary": output.strip().splitlines()[-1:]}
    print(output[-2000:])
    # a speed is only worth reporting where the numbers are right
    for name, options in RUNS.items():
        if status != 0:
            report["skipped"][name] = "the gpu tests failed"
            continue
        code, text = run([*BENCH, *options, "--json", "-"], deadline - time.monotonic())
        try:
            report["rows"][name] = json.loads(text[text.index("[") : text.rindex("]") + 1])
        except ValueError:
            report["skipped"][name] = f"exit status {code}: {text[-500:]}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {args.out}")
    return 0 if status == 0 and not report["skipped"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
