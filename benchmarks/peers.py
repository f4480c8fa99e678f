"""The same network trained for the same steps by each library: time to a loss, step time, memory, latency at B = 1.

python benchmarks/peers.py [--data fashion-mnist --root DIR] [--steps 100] [--batch 128] [--json FILE]

All libraries start from the same weights and see the same batches. Neurons are LIF, reset to zero in a way that makes
the spikes of all libraries the same; the last layer is a leaky integrator without spikes, the loss cross entropy on its
maximum over time, the optimizer Adam. Before training, losses and gradients at step 0 are compared with snnTorch's: a
loss that differs by more than --tolerance ends the run. They take turns of a few steps on the same batches, each turn
beginning with another one.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from snn_sparse_plugin import SparsePluginError, SpikeTrain
from snn_sparse_plugin.bench.measure import Spread, peak_bytes, saved_bytes
from snn_sparse_plugin.bench.problem import Config, Problem, scaled_weights
from snn_sparse_plugin.bench.providers import Model, get, logits
from snn_sparse_plugin.bench.report import human_bytes
from snn_sparse_plugin.core.version import commit, installed
from snn_sparse_plugin.data import SETS, load_spikes, loader

PROVIDERS = ("sparse-events", "sparse", "sparse-exact", "snntorch", "norse", "spikingjelly")
BASELINE = "snntorch"
SMOOTHING = 5  # losses averaged before they are compared with the target


@dataclass
class Contestant:
    """One library's network, its optimizer, and what was measured of it."""

    name: str
    config: Config
    model: Model
    optimizer: torch.optim.Optimizer
    row: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def input(self, x: SpikeTrain, dense: Tensor) -> Any:
        return x if isinstance(self.model.x, SpikeTrain) else dense

    def loss(self, x: SpikeTrain, dense: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x, dense), target)

    def logits(self, x: SpikeTrain, dense: Tensor) -> Tensor:
        return logits(self.config, self.model.spikes(self.input(x, dense)))

    def step(self, x: SpikeTrain, dense: Tensor, target: Tensor) -> None:
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(x, dense, target)
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        self.seconds.append(time.perf_counter() - begin)

    def smoothed(self) -> list[float]:
        """The mean of the last losses at every step."""
        ends = range(1, len(self.losses) + 1)
        return [sum(self.losses[max(0, k - SMOOTHING) : k]) / min(k, SMOOTHING) for k in ends]

    def seconds_to(self, target: float) -> float | None:
        """Time of the steps up to the first at which the smoothed loss is at the target."""
        reached = next((k for k, loss in enumerate(self.smoothed()) if loss <= target), None)
        return None if reached is None else sum(self.seconds[: reached + 1])


def enter(name: str, config: Config, problem: Problem, lr: float) -> Contestant:
    """A library's network with the problem's weights."""
    model = get(name).build(config, problem)
    groups: list[dict[str, Any]] = [{"params": model.parameters}]
    if name == "norse":
        # it multiplies the current by 1 - beta, so the weights before neurons are larger, and so must be their steps
        *hidden, weight, bias = model.parameters
        groups = [{"params": hidden, "lr": lr / (1 - config.beta)}, {"params": [weight, bias]}]
    library = get(name).library
    row: dict[str, Any] = {
        "provider": name,
        "about": get(name).about,
        "skipped": None,
        "versions": {library: installed(library), "torch": torch.__version__},
    }
    return Contestant(name, config, model, torch.optim.Adam(groups, lr=lr), row)


def compare_step_zero(
    contestants: Sequence[Contestant], config: Config, problem: Problem, x: SpikeTrain
) -> None:
    """Loss and gradients of the first batch, before any update, into every row, as errors against the baseline.

    SpikingJelly's SoftSign is the fast sigmoid times slope / 2, so the gradient of a layer is larger by one such
    factor for each spiking layer from it on; Adam's steps do not depend on it, and here it is divided out.
    """
    found = {}
    for each in contestants:
        loss = each.loss(x, problem.x, problem.target)
        grads = torch.autograd.grad(loss, each.model.parameters)
        if each.name == "spikingjelly":
            spiking = len(config.layers) - 1
            grads = tuple(g / (config.slope / 2) ** (spiking - k // 2) for k, g in enumerate(grads))
        found[each.name] = float(loss.detach()), grads
    expected, reference = found.get(BASELINE, next(iter(found.values())))
    norm = sum(float(g.square().sum()) for g in reference) ** 0.5
    for each in contestants:
        loss, grads = found[each.name]
        difference = sum(float((a - b).square().sum()) for a, b in zip(grads, reference, strict=True)) ** 0.5
        each.row |= {
            "loss_at_step_0": loss,
            "loss_error_at_step_0": abs(loss - expected) / expected,
            "gradient_error_at_step_0": difference / norm,
        }


def train(
    contestants: list[Contestant], batches: list[tuple[SpikeTrain, Tensor]], turn: int, progress: Progress
) -> None:
    """All on the same batches, in turns of a few steps."""
    task = progress.add_task("training", total=len(batches))
    collecting = gc.isenabled()
    gc.disable()
    try:
        for k, first in enumerate(range(0, len(batches), turn)):
            part = [(x, x.to_dense(), y) for x, y in batches[first : first + turn]]
            shift = k % len(contestants)
            for each in contestants[shift:] + contestants[:shift]:
                for batch in part:
                    each.step(*batch)
            gc.collect()
            progress.update(task, advance=len(part))
    finally:
        if collecting:
            gc.enable()


@torch.no_grad()
def latency(contestants: Sequence[Contestant], x: SpikeTrain, rounds: int) -> None:
    """Milliseconds of the forward pass of one sample, in turns, each untimed once before."""
    samples = [SpikeTrain.from_dense(x.to_dense()[:, k : k + 1]) for k in range(min(x.B, rounds))]
    seconds: dict[str, list[float]] = {each.name: [] for each in contestants}
    for one in samples:
        dense = one.to_dense()
        for each in contestants:
            given = each.input(one, dense)
            for timed in (False, True):
                begin = time.perf_counter()
                each.model.spikes(given)
                if timed:
                    seconds[each.name].append(time.perf_counter() - begin)
    for each in contestants:
        each.row["latency_ms"] = Spread.of(seconds[each.name])._asdict()


@torch.no_grad()
def accuracy(each: Contestant, batches: Sequence[tuple[SpikeTrain, Tensor]]) -> float:
    right = sum(int((each.logits(x, x.to_dense()).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """What they compute, and what it takes."""
    rows = [row for row in rows if not row["skipped"]]
    base = next((row["step_ms"]["median"] for row in rows if row["provider"] == BASELINE), None)
    computed = _table("", "loss, step 0", "Δ gradient", "last loss", "accuracy")
    taken = _table("", "s to loss", "step ms", "ratio", "saved", "peak", "B=1 ms")
    for row in rows:
        step, to_loss = row["step_ms"], row["seconds_to_loss"]
        computed.add_row(
            row["provider"],
            f"{row['loss_at_step_0']:.6f}",
            f"{row['gradient_error_at_step_0']:.1e}",
            f"{row['last_loss']:.3f}",
            f"{100 * row['test_accuracy']:.1f} %",
        )
        taken.add_row(
            row["provider"],
            "–" if to_loss is None else f"{to_loss:.2f}",
            f"{step['median']:.1f} ({step['p20']:.1f}–{step['p80']:.1f})",
            "" if base is None else f"{base / step['median']:.1f}×",
            human_bytes(row["saved_bytes"]),
            human_bytes(row["peak_bytes"]),
            f"{row['latency_ms']['median']:.2f}",
        )
    return [computed, taken]


def _table(first: str, *others: str) -> Table:
    shown = Table(box=None, pad_edge=False)
    shown.add_column(first, no_wrap=True)
    for column in others:
        shown.add_column(column, justify="right", no_wrap=True)
    return shown


def run(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """All rows; those of libraries that are not there say so under ``skipped``."""
    torch.set_num_threads(args.threads)
    data = load_spikes(args.data, args.root, steps=args.T, limit=args.limit)
    generator = torch.Generator().manual_seed(args.seed)
    order = loader(data.train, args.batch, shuffle=True, generator=generator, drop_last=True)
    if not len(order):
        sys.exit(f"{len(data.train)} training samples make no batch of {args.batch}.")
    batches: list[tuple[SpikeTrain, Tensor]] = []
    while len(batches) < args.steps:
        batches += list(order)[: args.steps - len(batches)]
    x, target = batches[0]
    config = Config(
        inputs=data.features,
        layers=(*args.hidden, data.classes),
        steps=data.T,
        batch=args.batch,
        density=max(x.density, 1e-6),
        slope=args.slope,
        window=args.window,
        reset="zero",
        readout=True,
        seed=args.seed,
    )
    weights, rates = scaled_weights(x.to_dense(), config, generator)
    problem = Problem(x.to_dense(), target, weights, rates, torch.empty(0))

    contestants, rows = [], []
    for name in args.providers:
        try:
            contestants.append(enter(name, config, problem, args.lr))
            rows.append(contestants[-1].row)
        except SparsePluginError as error:
            rows.append({"provider": name, "skipped": str(error)})
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        compare_step_zero(contestants, config, problem, x)
        for each in contestants:
            if each.row["loss_error_at_step_0"] > args.tolerance:
                sys.exit(
                    f"{each.name} does not compute the same: loss {each.row['loss_at_step_0']:.6f} at step 0, "
                    f"{BASELINE} has {contestants[0].row['loss_at_step_0']:.6f}; tolerance {args.tolerance:g}."
                )
            count, out = saved_bytes(
                lambda each=each: each.loss(x, problem.x, target),
                [*each.model.parameters, problem.x, x.indptr, x.indices],
            )
            each.row["saved_bytes"] = count
            del out
        train(contestants, batches, args.turn, progress)
        progress.add_task("test and latency", total=None)
        test = list(loader(data.test, args.batch))[: args.test_batches]
        latency(contestants, test[0][0], args.rounds)
        for each in contestants:
            each.row["test_accuracy"] = accuracy(each, test)
            # the same shapes, density and rate, on random input, in a process of its own
            shape = replace(config, rate=min(0.5, max(1e-3, sum(rates) / len(rates))))
            each.row["peak_bytes"] = peak_bytes(shape, each.name, args.threads) if args.peak else None

    goal = args.loss if args.loss is not None else max(each.smoothed()[-1] for each in contestants)
    about = {
        "op": "training",
        "data": args.data,
        "shape": {"T": data.T, "B": args.batch, "inputs": data.features, "layers": list(config.layers)},
        "steps": args.steps,
        "density": x.density,
        "layer_rates": [round(rate, 5) for rate in rates],
        "window": args.window,
        "target_loss": goal,
        "dtype": "float32",
        "device": "cpu",
        "threads": args.threads,
        "commit": commit(),
    }
    for each in contestants:
        each.row |= {
            "last_loss": each.smoothed()[-1],
            "seconds_to_loss": each.seconds_to(goal),
            "step_ms": Spread.of(each.seconds)._asdict(),
            "losses": [round(loss, 5) for loss in each.losses],
        }
    rows = [row | about for row in rows]
    size = "-".join(str(n) for n in (data.features, *config.layers))
    console.print(
        f"{args.steps} training steps on {args.data}, {size}, T={data.T}, B={args.batch}, input "
        f"{100 * x.density:.2g} %, {args.threads} threads; s to loss: until {goal:.3f}, mean of {SMOOTHING} steps",
        highlight=False,
    )
    for shown in tables(rows):
        console.print(shown)
    for row in rows:
        if row["skipped"]:
            console.print(f"[yellow]skipped[/] {row['provider']}: {row['skipped']}", highlight=False)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=list(SETS), default="digits")
    parser.add_argument("--root", type=Path, help="folder of the data set's files")
    parser.add_argument("--limit", type=int, help="at most so many training samples")
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    parser.add_argument("--T", type=int, help="steps of a sample; the published number by default")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--hidden", type=int, nargs="+", default=[200, 200])
    parser.add_argument("--slope", type=float, default=100.0, help="of the fast sigmoid")
    parser.add_argument("--window", type=float, default=0.2, help="backprop_threshold of the sparse rows")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--loss", type=float, help="target of 's to loss'; default: where the last one ends")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="relative, of the loss at step 0")
    parser.add_argument("--turn", type=int, default=5, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=15, help="samples for the latency")
    parser.add_argument("--test-batches", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-peak", dest="peak", action="store_false")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS))
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args(argv)
    rows = run(args, Console())
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
