"""Which step loops are slower in sparse mode than without it: the slowest programs of three collections.

Each program runs upstream and in ``sparse_mode()`` in turn, on a network of its own; the first passes, in which sparse
mode compiles kernels and learns what pays, do not count. Times are processor time on one thread.

python benchmarks/programs.py                     # the zoo of the tests, and a grid of sizes
python benchmarks/programs.py --only tutorials    # the tutorials, each in processes of its own
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from itertools import product
from pathlib import Path
from time import process_time
from typing import Any

import snntorch as snn
import torch
from rich.console import Console
from rich.table import Table
from snntorch import utils
from torch import Tensor, nn

import snn_sparse_plugin as ssp

ROOT = Path(__file__).parent.parent
GRID = {"N": (10, 50, 200), "B": (1, 8, 64), "T": (5, 25, 100), "layers": (1, 2, 3), "density": (0.02, 0.3)}
SMALL = {"N": (10, 100), "B": (1, 32), "T": (5, 50), "layers": (2,), "density": (0.02, 0.3)}

Pass = Callable[[], Any]


def zoo() -> Iterator[tuple[str, Callable[[], Pass]]]:
    """The programs of ``tests/fusion/zoo.py``."""
    sys.path.insert(0, str(ROOT / "tests" / "fusion"))
    found = import_module("zoo")
    for name, entry in found.ZOO.items():
        library = import_module("norse.torch" if entry.needs == "norse" else entry.needs)

        def build(entry: Any = entry, library: Any = library) -> Pass:
            net = entry.build(library)
            x = (torch.rand(found.T, found.B, found.M) < 0.4).float()
            y = torch.arange(found.B) % found.N

            def run() -> None:
                utils.reset(net)
                for module in net.modules():  # the program hooks them anew
                    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
                        getattr(module, hooks).clear()
                _, loss = entry.program(net, x, y)
                if loss is not None:
                    loss.sum().backward()

            return run

        yield f"zoo {name}", build


def grid(sizes: dict[str, tuple[Any, ...]]) -> Iterator[tuple[str, Callable[[], Pass]]]:
    """A plain training loop in many sizes."""
    for values in product(*sizes.values()):
        size = dict(zip(sizes, values, strict=True))
        yield (
            "loop " + " ".join(f"{k}={v}" for k, v in size.items()),
            lambda size=size: _loop(**size),  # type: ignore[misc]
        )


def _loop(N: int, B: int, T: int, layers: int, density: float) -> Pass:
    x, y = (torch.rand(T, B, N) < density).float(), torch.randint(0, N, (B,))
    fcs = nn.ModuleList(nn.Linear(N, N) for _ in range(layers))
    lifs = nn.ModuleList(snn.Leaky(0.9) for _ in range(layers))
    optimizer = torch.optim.SGD(fcs.parameters(), lr=1e-3)

    def run() -> None:
        mems: list[Tensor] = [lif.init_leaky() for lif in lifs]
        out = []
        for step in x:
            spikes = step
            for k in range(layers):
                spikes, mems[k] = lifs[k](fcs[k](spikes), mems[k])
            out.append(spikes)
        loss = nn.functional.cross_entropy(torch.stack(out).sum(0), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def compare(build: Callable[[], Pass], options: dict[str, Any], rounds: int) -> tuple[float, float, float]:
    """Milliseconds of a pass upstream and in sparse mode, and the median of their ratios."""
    passes = []
    for _ in range(2):
        torch.manual_seed(0)
        passes.append(build())
    times: list[list[float]] = [[], []]
    for number in range(2 + rounds):
        for way in (0, 1) if number % 2 else (1, 0):
            torch.manual_seed(number)
            start = process_time()
            with ssp.sparse_mode(**options) if way else nullcontext():
                passes[way]()
            seconds = process_time() - start  # with what sparse mode's begin and end take
            if number >= 2:
                times[way].append(1e3 * seconds)
    upstream, sparse = map(statistics.median, times)
    return upstream, sparse, statistics.median(u / s for u, s in zip(*times, strict=True))


def tutorials(rounds: int) -> Iterator[tuple[str, float, float, float]]:
    folder = ROOT / "examples" / "tutorials"
    for script in sorted(folder.glob("*_*.py")):
        if script.name == "run_all.py":
            continue
        seconds: dict[str, list[float]] = {"upstream": [], "sparse": []}
        for _ in range(rounds):
            for mode, found in seconds.items():
                done = subprocess.run(
                    [sys.executable, str(script), "--mode", mode], capture_output=True, text=True
                )
                if done.returncode:
                    break
                found.append(1e3 * json.loads(done.stdout.strip().splitlines()[-1])["seconds"])
        if seconds["sparse"]:
            ratio = statistics.median(u / s for u, s in zip(*seconds.values(), strict=True))
            yield f"tutorial {script.stem}", *map(statistics.median, seconds.values()), ratio  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("zoo", "grid", "tutorials"))
    parser.add_argument("--full", action="store_true", help="all sizes of the grid")
    parser.add_argument("--match", default="", help="programs whose name contains this")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--show", type=int, default=20, help="how many of the slowest are shown")
    parser.add_argument("--exact", action="store_true", help="backprop_threshold=None")
    args = parser.parse_args()
    torch.set_num_threads(1)
    options: dict[str, Any] = {"backprop_threshold": None} if args.exact else {}
    rows: list[tuple[str, float, float, float]] = []
    programs = [] if args.only in ("grid", "tutorials") else list(zoo())
    programs += [] if args.only in ("zoo", "tutorials") else list(grid(GRID if args.full else SMALL))
    for name, build in programs:
        if args.match in name:
            rows.append((name, *compare(build, options, args.rounds)))
    if args.only == "tutorials":
        rows += tutorials(args.rounds)
    rows.sort(key=lambda row: row[3])
    table = Table("program", "upstream, ms", "sparse mode, ms", "times faster")
    for name, upstream, sparse, ratio in rows[: args.show]:
        table.add_row(name, f"{upstream:.2f}", f"{sparse:.2f}", f"{ratio:.2f}")
    Console(width=120).print(table)
    print(f"{sum(row[3] < 0.95 for row in rows)} of {len(rows)} programs are slower than 0.95 of upstream")


if __name__ == "__main__":
    main()
