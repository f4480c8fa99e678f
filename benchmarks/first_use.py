"""What a first use costs: kernels that are compiled because the machine has none, and the first loop of a process.

python benchmarks/first_use.py              # three processes a row, medians of wall time
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import snntorch as snn
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--processes", type=int, default=3)
parser.add_argument("--run", help=argparse.SUPPRESS)
args = parser.parse_args()


def demo() -> Callable[[], None]:
    """The training step with which ``snn-sparse demo`` compiles its kernels."""
    from snn_sparse_plugin import unroll
    from snn_sparse_plugin.data import latency_spikes
    from snn_sparse_plugin.interfaces.demo import NETWORKS

    net = NETWORKS["snntorch"]((64, 200, 200, 10), 0, True)
    x = latency_spikes(torch.rand(2, 64), steps=100, tau=40.0)

    def step() -> None:
        unroll(net, x).mem.mean(0).sum().backward()  # type: ignore[union-attr]

    return step


def loop() -> Callable[[], None]:
    """A training step of a step loop in ``sparse_mode()``, with the import of the package."""

    def step() -> None:
        from snn_sparse_plugin import sparse_mode

        with sparse_mode():
            train()

    fc, lif, x = nn.Linear(64, 200), snn.Leaky(beta=0.9), (torch.rand(50, 32, 64) < 0.05).float()

    def train() -> None:
        mem: Any = lif.reset_mem()
        counts: Tensor | float = 0.0
        for spikes in x:
            spikes, mem = lif(fc(spikes), mem)
            counts = counts + spikes
        counts.sum().backward()  # type: ignore[union-attr]

    return step


RUNS = {"the demo's step": demo, "a step loop": loop}


def seconds(run: str, cache: str) -> float:
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "SNN_SPARSE_QUIET": "1"}
    command = [sys.executable, __file__, "--run", run]
    return float(
        subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    )


def main() -> None:
    table = Table("first use in a process", "kernels", "s")
    for run in RUNS:
        found: dict[str, list[float]] = {"compiled": [], "on disk": []}
        for _ in range(args.processes):
            with TemporaryDirectory() as cache:
                for times in found.values():
                    times.append(seconds(run, cache))
        for kernels, times in found.items():
            table.add_row(run, kernels, f"{median(times):.2f}")
    Console().print(table)


if __name__ == "__main__":
    if args.run:
        step = RUNS[args.run]()
        begun = perf_counter()
        step()
        print(perf_counter() - begun)
    else:
        main()
