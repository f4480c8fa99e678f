"""Run every tutorial with upstream alone and inside sparse_mode, each in a process of its own, and compare.

python examples/tutorials/run_all.py --root FOLDER    # with the recordings that one of them needs
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", help="folder of N-MNIST's Train.zip and Test.zip")
parser.add_argument("--only", help="run the tutorials whose name contains this")
parser.add_argument("--modes", default="upstream,sparse")
args = parser.parse_args()


def run(script: Path, mode: str) -> dict[str, Any] | str:
    """The numbers of a tutorial's last line, or why there are none."""
    command = [sys.executable, str(script), "--mode", mode, *(["--root", args.root] if args.root else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


console, modes, failed = Console(), args.modes.split(","), False
table = Table("tutorial", "score", *(f"{m}: loss, score, s" for m in modes), "times faster")
scripts = [s for s in sorted(Path(__file__).parent.glob("*_*.py")) if s.name != "run_all.py"]
for script in scripts:
    if args.only and args.only not in script.stem:
        continue
    with console.status(script.stem):
        found = [run(script, mode) for mode in modes]
    missing = next((f for f in found if isinstance(f, str)), None)
    if missing is not None:
        skipped = "needs" in missing
        failed |= not skipped
        table.add_row(script.stem, "", f"{'skipped' if skipped else 'failed'}: {missing}")
        continue
    numbers: list[dict[str, Any]] = [f for f in found if isinstance(f, dict)]
    cells = [f"{n['loss']:.4f}, {n['score']:.1f}, {n['seconds']:.2f}" for n in numbers]
    ratio = numbers[0]["seconds"] / max(numbers[-1]["seconds"], 1e-9)
    failed |= "accuracy" in numbers[0]["unit"] and abs(numbers[0]["score"] - numbers[-1]["score"]) > 1
    table.add_row(script.stem, numbers[0]["unit"], *cells, f"{ratio:.1f}")
console.print(table)
sys.exit(int(failed))
