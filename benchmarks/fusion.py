"""Time fusion: unmodified step loops against upstream, against ``unroll``, and what recording itself costs.

python benchmarks/fusion.py            # 2 threads, 15 alternating rounds; --json FILE writes the rows
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, thread_time
from typing import Any

import snntorch as snn
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from snntorch import surrogate
from torch import nn

from snn_sparse_plugin import sparse_mode
from snn_sparse_plugin.bench.problem import Config
from snn_sparse_plugin.bench.providers import setup
from snn_sparse_plugin.fusion.context import here

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
parser.add_argument("--json", type=Path)
args = parser.parse_args()
torch.set_num_threads(args.threads)


class Tutorial(nn.Module):
    """784-1000-10 Leaky, the same image at every step."""

    def __init__(self, hidden: int, steps: int, **options: Any) -> None:
        super().__init__()
        self.steps = steps
        self.fc1, self.lif1 = nn.Linear(784, hidden), snn.Leaky(beta=0.95, **options)
        self.fc2, self.lif2 = nn.Linear(hidden, 10), snn.Leaky(beta=0.95, **options)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        spk_rec, mem_rec = [], []
        for _ in range(self.steps):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk_rec.append(spk2)
            mem_rec.append(mem2)
        return torch.stack(spk_rec), torch.stack(mem_rec)


def tutorial(mode: dict[str, Any] | None, **options: Any) -> Callable[[], None]:
    """A full training step with Adam and the loss of every membrane."""
    torch.manual_seed(0)
    batch, hidden, steps = (8, 50, 5) if args.small else (128, 1000, 25)
    net = Tutorial(hidden, steps, **options)
    x, y = torch.rand(batch, 784), torch.randint(0, 10, (batch,))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-4)

    def step() -> None:
        with sparse_mode(**mode) if mode is not None else nullcontext():
            _, mem = net(x)
            loss = torch.zeros(1)
            for t in range(steps):
                loss += F.cross_entropy(mem[t], y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return step


def provider(name: str) -> Callable[[], None]:
    """A step of the 700-200-200-20 benchmark network on spikes."""
    config = Config(steps=5, batch=4, inputs=30, layers=(20, 5)) if args.small else Config(steps=100)
    steps = setup(config, name)

    def step() -> None:
        for p in steps.parameters:
            p.grad = None
        steps.backward(steps.forward())

    return step


def flushing(mode: dict[str, Any]) -> Callable[[], None]:
    """A loop that reads a number at every step."""
    torch.manual_seed(0)
    fc, lif, x = nn.Linear(100, 100), snn.Leaky(beta=0.9), torch.rand(64, 100)

    def step() -> None:
        with sparse_mode(**mode):
            mem = lif.reset_mem()
            for _ in range(5 if args.small else 100):
                spk, mem = lif(fc(x), mem)
                spk.sum().item()

    return step


def recording(calls: int = 200) -> float:
    """Microseconds for recording a linear layer and a neuron for one step."""
    net = Tutorial(4, calls)
    x = torch.rand(2, 784)
    with sparse_mode():
        net(x)[0].sum().item()
        start = thread_time()  # pure Python on one thread
        found = net(x)
        spent = thread_time() - start
        found[0].sum().item()
    assert here.record is None
    return 1e6 * spent / (2 * calls)


exact, auto, off = {"backprop_threshold": None}, {}, {"fuse_time": False}
narrow = {"spike_grad": surrogate.fast_sigmoid(slope=25)}
ways = {
    "tutorial, upstream": tutorial(None),
    "tutorial, fused": tutorial(auto),
    "tutorial, fused, exact": tutorial(exact),
    "tutorial, stepped": tutorial(off),
    "tutorial, fast sigmoid, upstream": tutorial(None, **narrow),
    "tutorial, fast sigmoid, fused": tutorial(auto, **narrow),
    "spikes, unroll": provider("sparse"),
    "spikes, fused loop": provider("sparse-loop"),
    "spikes, upstream": provider("snntorch"),
    "reading every step, fused": flushing(auto),
    "reading every step, stepped": flushing(off),
}
times: dict[str, list[float]] = {name: [] for name in ways}
overheads = []
names = list(ways)
for round in track(range(args.rounds + 1), description="rounds"):
    for name in names[round % len(names) :] + names[: round % len(names)]:
        ways[name]()
        gc.disable()
        start = perf_counter()
        ways[name]()
        spent = perf_counter() - start
        gc.enable()
        if round:
            times[name].append(spent)
    overheads.append(recording())

console = Console()
table = Table("way", "ms", "p20", "p80")
for name, found in times.items():
    low, *_, high = quantiles(found, n=5) if len(found) > 1 else found * 2
    table.add_row(name, *(f"{1e3 * t:.2f}" for t in (median(found), low, high)))
console.print(table)
middle = {name: median(found) for name, found in times.items()}
summary = {
    "tutorial: times faster than upstream": middle["tutorial, upstream"] / middle["tutorial, fused"],
    "tutorial, fast sigmoid: times faster than upstream": middle["tutorial, fast sigmoid, upstream"]
    / middle["tutorial, fast sigmoid, fused"],
    "spikes: speed of the fused loop, unroll = 1": middle["spikes, unroll"] / middle["spikes, fused loop"],
    "recording one layer-step (linear and neuron), us": median(overheads),
    "recording one call, us": median(overheads) / 2,
    "reading every step: time, stepped = 1": middle["reading every step, fused"]
    / middle["reading every step, stepped"],
}
for text, value in summary.items():
    console.print(f"{text}: {value:.2f}")
if args.json:
    row = {"threads": args.threads, "torch": torch.__version__, "seconds": times, "summary": summary}
    args.json.write_text(json.dumps(row, indent=2) + "\n")
