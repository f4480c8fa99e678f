"""Run every tutorial with upstream alone and inside sparse_mode, each in a process of its own, and compare.

With exact gradients loss and accuracy have to be upstream's; with the default window, which trains along another
gradient, they are shown.

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
parser.add_argument("--modes", default="upstream,exact,sparse")
args = parser.parse_args()


def run(script: Path, mode: str) -> dict[str, Any] | str:
    """The numbers of a tutorial's last line, or why there are none."""
    command = [sys.executable, str(script), "--mode", mode, *(["--root", args.root] if args.root else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


console, modes, failed = Console(), args.modes.split(","), False
table = Table("tutorial", "score", *(f"{m}: loss, score, s, times faster" for m in modes))
scripts = [s for s in sorted(Path(__file__).parent.glob("*_*.py")) if s.name != "run_all.py"]
for script in scripts:
    if args.only and args.only not in script.stem:
        continue
    if not console.is_terminal:  # a log has no spinner
        console.print(f"{script.stem} …", highlight=False)
    with console.status(script.stem):
        found = [run(script, mode) for mode in modes]
    missing = next((f for f in found if isinstance(f, str)), None)
    if missing is not None:
        skipped = "needs" in missing
        failed |= not skipped
        table.add_row(script.stem, "", f"{'skipped' if skipped else 'failed'}: {missing}")
        continue
    numbers: list[dict[str, Any]] = [f for f in found if isinstance(f, dict)]
    first, cells = numbers[0], []
    for mode, n in zip(modes, numbers, strict=True):
        faster = first["seconds"] / max(n["seconds"], 1e-9)
        cells.append(f"{n['loss']:.4f}, {n['score']:.1f}, {n['seconds']:.2f}, {faster:.1f}")
        if mode == "exact":
            failed |= abs(first["score"] - n["score"]) > 1 or abs(first["loss"] - n["loss"]) > 0.02 * abs(
                first["loss"]
            )
    table.add_row(script.stem, first["unit"], *cells)
console.print(table)
sys.exit(int(failed))
