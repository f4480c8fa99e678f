"""The fixed cost of a call: small training steps and streams through ``unroll``, against snnTorch's loop.

python benchmarks/fixed_cost.py                    # one thread, 15 alternating rounds of processor time
python benchmarks/fixed_cost.py --against DIR      # beside the package of another checkout, in a process of its own
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import snntorch as snn
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--against", type=Path, help="root of another checkout")
parser.add_argument("--serve", choices=("loop", "unroll"), help=argparse.SUPPRESS)
args = parser.parse_args()

REPEATS = 20  # of a form in a round: after another process has run, the first few find nothing in the caches
Run = Callable[[nn.Sequential, Tensor], Any]


def network(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    options = {"beta": 0.9, "init_hidden": True, "spike_grad": snn.surrogate.fast_sigmoid(25)}
    layers: list[nn.Module] = []
    for inputs, neurons in pairwise(sizes):
        layers += [nn.Linear(inputs, neurons), snn.Leaky(**options)]
    layers[-1].output = True  # type: ignore[assignment]
    return nn.Sequential(*layers)


def reset(net: nn.Sequential) -> None:
    for layer in net:
        if isinstance(layer, snn.Leaky):
            layer.reset_mem()


def training(run: Run, T: int = 10, B: int = 8, **options: Any) -> Callable[[], None]:
    net = network(784, 200, 200, 10)
    x, y = (torch.rand(T, B, 784) < 0.05).float(), torch.randint(10, (B,))

    def step() -> None:
        reset(net)
        net.zero_grad()
        F.cross_entropy(run(net, x, **options)[1].mean(0), y).backward()

    return step


def stream(run: Run, chunk: int = 10) -> Callable[[], None]:
    """100 steps of one sample, in chunks, each from where the one before ended."""
    net, chunks = network(700, 200, 200, 20), (torch.rand(100, 1, 700) < 0.05).float().split(chunk)

    @torch.no_grad()
    def step() -> None:
        reset(net)
        for x in chunks:
            run(net, x)

    return step


FORMS: dict[str, Callable[[Run], Callable[[], None]]] = {
    "training step, T=10, B=8": training,
    "training step, T=100, B=64": lambda run: training(run, 100, 64),
    "stream, 100 steps in chunks of 10": stream,
}


def loop(net: nn.Sequential, x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    spikes, membranes = zip(*(net(step) for step in x), strict=True)
    return torch.stack(spikes), torch.stack(membranes)


def serve(way: str) -> None:
    """Read the name of a form, answer with its milliseconds."""
    torch.set_num_threads(args.threads)
    run: Run = loop
    if way == "unroll":
        from snn_sparse_plugin import unroll

        run = unroll
    steps = {name: form(run) for name, form in FORMS.items()}
    for step in steps.values():
        for _ in range(3):
            step()
    print("ready", flush=True)
    for line in sys.stdin:
        begun = process_time()
        for _ in range(REPEATS):
            steps[line.strip()]()
        print(1e3 * (process_time() - begun) / REPEATS, flush=True)


def process(way: str, root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", way, "--threads", str(args.threads)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(args.threads)}
    pipe = subprocess.PIPE
    made = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
    assert made.stdout is not None
    if "ready" not in made.stdout.readline():
        raise SystemExit(f"the process for {way} of {root} ended.")
    return made


def ask(server: subprocess.Popen[str], form: str) -> float:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(form + "\n")
    server.stdin.flush()
    return float(server.stdout.readline())


def main() -> None:
    here = Path(__file__).resolve().parent.parent
    servers = {"snnTorch's loop": process("loop", here), "unroll": process("unroll", here)}
    if args.against:
        servers[f"unroll of {args.against}"] = process("unroll", args.against.resolve())
    table = Table("form", "way", "ms", "of the loop's time")
    for form in FORMS:
        times: dict[str, list[float]] = {name: [] for name in servers}
        for round in range(args.rounds):
            # not to and fro: who ends a round would begin the next one, with warm caches
            turn = round % len(servers)
            for name in (*list(servers)[turn:], *list(servers)[:turn]):
                times[name].append(ask(servers[name], form))
        base = times["snnTorch's loop"]
        for name, found in times.items():
            ratio = median(a / b for a, b in zip(found, base, strict=True))
            table.add_row(form, name, f"{median(found):.2f}", f"{ratio:.3f}")
    for server in servers.values():
        server.terminate()
    Console().print(table)


if __name__ == "__main__":
    if args.serve:
        serve(args.serve)
    else:
        main()
