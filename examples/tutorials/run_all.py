"""Run every tutorial with upstream alone and inside sparse_mode, each in a process of its own, and compare.

With exact gradients the loss of the second step has to be upstream's, and the score in the end, give or take what
rounding grows to in training: a library sums a product in an order that depends on its size, and upstream with another
number of threads ends with a loss that is a tenth higher or lower. With the default window, which trains along another
gradient, both are shown.

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

from snn_sparse_plugin.core.tables import show_table

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", help="folder of N-MNIST's Train.zip and Test.zip")
parser.add_argument("--only", help="run the tutorials whose name contains this")
parser.add_argument("--modes", default="upstream,exact,sparse")
args = parser.parse_args()


def run(script: Path, mode: str) -> dict[str, Any] | str:
    """The numbers of a tutorial's last line, or why there are none."""
    command = [sys.executable, str(script), "--mode", mode, *(["--root", args.root] if args.root else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def say(line: str) -> None:
    """A line for each tutorial while the others run, which no width breaks."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


console, modes, failed = Console(), args.modes.split(","), False
scripts = [s for s in sorted(Path(__file__).parent.glob("*_*.py")) if s.name != "run_all.py"]
scripts = [s for s in scripts if not args.only or args.only in s.stem]
rows: list[tuple[str, ...]] = []
for count, script in enumerate(scripts, start=1):
    found = []
    for mode in modes:
        with console.status(f"{script.stem}, {mode}"):
            found.append(run(script, mode))
    missing = next((f for f in found if isinstance(f, str)), None)
    if missing is not None:
        skipped = "needs" in missing
        failed |= not skipped
        say(f"{count} of {len(scripts)} {script.stem}: {'skipped' if skipped else 'failed'}: {missing}")
        continue
    numbers: list[dict[str, Any]] = [f for f in found if isinstance(f, dict)]
    first = numbers[0]
    say(f"{count} of {len(scripts)} {script.stem}: {first['unit']}")
    for mode, n in zip(modes, numbers, strict=True):
        faster = first["seconds"] / max(n["seconds"], 1e-9)
        cells = (f"{n['loss']:.4f}", f"{n['score']:.1f}", f"{n['seconds']:.2f}", f"{faster:.1f}×")
        rows.append((script.stem if n is first else "", mode, *cells))
        say(f"  {mode}: loss {cells[0]}, score {cells[1]}, {cells[2]} s, ratio {cells[3]}")
        if mode == "exact":
            apart = abs(first["early"] - n["early"]) > 1e-5 * abs(first["early"])
            failed |= apart or abs(first["score"] - n["score"]) > 1
show_table(console, ("tutorial", "mode", "loss", "score", "s", "ratio"), rows, keys=2)
sys.exit(int(failed))
