"""Training of small TTFS networks, and the ablation of the training methods: SM, +SR, +TR, +TB at two weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from ...data import ImageData
from ...errors import ConfigError
from .convert import to_ttfs
from .mapping import to_snn
from .training import RelaxationSchedule, hidden_layers, ttfs_loss


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. ``coding`` False is the ReLU network; ``relax`` the share of the epochs with SR."""

    name: str
    coding: bool = True
    relax: float = 0.0
    tr: float = 0.0
    tb: float = 0.0
    form: str = "paper"


@dataclass(frozen=True)
class TrainOptions:
    """Options of :func:`train`; ``flip`` mirrors images at random."""

    epochs: int = 30
    batch: int = 64
    lr: float = 2e-3
    window: int = 32
    tau: float = 10.0
    flip: bool = False
    threads: int = 0


def recipes(tr: float = 1e-3, tb: Sequence[float] = (0.003, 0.01), form: str = "paper") -> list[Recipe]:
    """The rows of the ablation table, the ReLU network first.

    Example:
        >>> [r.name for r in recipes()]
        ['ReLU', 'SM', '+SR', '+TR', '+TB 0.003', '+TB 0.01']
    """
    rows = [Recipe("ReLU", coding=False), Recipe("SM"), Recipe("+SR", relax=0.5)]
    rows.append(replace(rows[-1], name="+TR", tr=tr))
    return rows + [replace(rows[3], name=f"+TB {weight:g}", tb=weight, form=form) for weight in tb]


def build(network: nn.Module, recipe: Recipe, options: TrainOptions) -> nn.Module:
    """The network for a recipe: as it is, or with TTFS layers and an encoder of the images in front."""
    if not recipe.coding:
        return network
    return to_ttfs(network, window=options.window, tau=options.tau)


def train(
    model: nn.Module,
    data: ImageData,
    recipe: Recipe,
    options: TrainOptions,
    *,
    seed: int = 0,
    epoch_done: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """Adam with a cosine schedule; returns the model in eval mode.

    ``epoch_done`` is called with the number of epochs done and the model.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    steps = options.epochs * -(-len(data.train_y) // options.batch)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    relaxation = None
    if recipe.relax:
        relaxation = RelaxationSchedule(model, round(recipe.relax * options.epochs))
    for epoch in range(options.epochs):
        model.train()
        for batch in torch.randperm(len(data.train_y), generator=generator).split(options.batch):
            if len(batch) < 2:  # one sample has no batch statistics
                continue
            x, y = data.train_x[batch].to(device), data.train_y[batch].to(device)
            if options.flip:
                x = _flipped(x, generator)
            tb = recipe.tb if recipe.coding else 0.0
            loss = ttfs_loss(
                model(x), y, model, tr=recipe.tr if recipe.coding else 0.0, tb=tb, form=recipe.form
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            cosine.step()
        if relaxation is not None:
            relaxation.step()
        if epoch_done is not None:
            epoch_done(epoch + 1, model)
    return model.eval()


def _flipped(x: Tensor, generator: torch.Generator) -> Tensor:
    """Square images (B, pixels) of one channel or of three, half of them mirrored."""
    channels = 1 if math.isqrt(x.shape[1]) ** 2 == x.shape[1] else 3
    side = math.isqrt(x.shape[1] // channels)
    images = x.view(-1, channels, side, side)
    mirror = torch.rand(len(x), generator=generator) < 0.5
    mirror = mirror.to(x.device).view(-1, 1, 1, 1)
    return torch.where(mirror, images.flip(-1), images).view_as(x)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 500) -> float:
    """Share of samples (B, …) whose largest output is their label."""
    device = next(model.parameters()).device
    parts = zip(x.split(batch), y.split(batch), strict=True)
    return sum(int((model(a.to(device)).argmax(-1).cpu() == b).sum()) for a, b in parts) / len(y)


@dataclass(frozen=True)
class Outcome:
    """One network: test accuracy, spikes per sample (hidden, with the input's), latency, tau of each layer."""

    recipe: str
    seed: int
    accuracy: float
    hidden_spikes: float
    spikes: float
    latency: int
    tau: tuple[float, ...]
    x_m: tuple[float, ...]


def run_ablation(
    network: Callable[[], nn.Module],
    data: ImageData,
    rows: Sequence[Recipe],
    options: TrainOptions,
    *,
    seeds: int = 5,
    console: Console | None = None,
    device: str = "cpu",
) -> list[Outcome]:
    """Train every recipe with every seed; weights of one seed start equal in all rows.

    Raises:
        ConfigError: no seeds or epochs.
    """
    if seeds < 1 or options.epochs < 1:
        raise ConfigError(
            f"an ablation has at least one seed and one epoch, got {seeds} and {options.epochs}."
        )
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        return _run(network, data, rows, options, seeds, console or Console(quiet=True), device)
    finally:
        torch.set_num_threads(before)


def _run(
    network: Callable[[], nn.Module],
    data: ImageData,
    rows: Sequence[Recipe],
    options: TrainOptions,
    seeds: int,
    console: Console,
    device: str,
) -> list[Outcome]:
    found = []
    jobs = [(seed, recipe) for seed in range(seeds) for recipe in rows]
    for seed, recipe in track(jobs, description="training", console=console, disable=not console.is_terminal):
        torch.manual_seed(seed)
        model = train(build(network(), recipe, options).to(device), data, recipe, options, seed=seed)
        found.append(_outcome(model, data, recipe, seed))
        console.print(
            f"seed {seed} {recipe.name}: {100 * found[-1].accuracy:.2f} %, {found[-1].hidden_spikes:.1f} hidden spikes"
        )
    return found


def _outcome(model: nn.Module, data: ImageData, recipe: Recipe, seed: int) -> Outcome:
    right = accuracy(model, data.test_x, data.test_y)
    if not recipe.coding:
        return Outcome(recipe.name, seed, right, 0.0, 0.0, 0, (), ())
    layers = [layer for _, layer in hidden_layers(model)]
    counted = to_snn(model.cpu(), data.test_x[:1]).report(data.test_x[:1000])
    taus = tuple(float(layer.tau.detach()) for layer in layers)
    least = tuple(layer.x_m for layer in layers)
    return Outcome(
        recipe.name, seed, right, counted.hidden_spikes, counted.spikes, counted.latency, taus, least
    )


def summary(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, by recipe, as plain data."""
    rows = []
    for name in dict.fromkeys(o.recipe for o in outcomes):
        group = [o for o in outcomes if o.recipe == name]
        right = torch.tensor([100 * o.accuracy for o in group], dtype=torch.float64)
        row: dict[str, Any] = {
            "recipe": name,
            "seeds": len(group),
            "accuracy": float(right.mean()),
            "deviation": float(right.std()) if len(group) > 1 else 0.0,
            "latency": group[0].latency,
        }
        for key in ("hidden_spikes", "spikes"):
            row[key] = sum(getattr(o, key) for o in group) / len(group)
        rows.append(row)
    return rows


def as_table(outcomes: Sequence[Outcome], title: str = "") -> Table:
    """The ablation table, for a rich console."""
    table = Table(
        "", "accuracy", "hidden spikes", "all spikes", "steps", title=title or None, box=None, pad_edge=False
    )
    for row in summary(outcomes):
        counts = (
            [f"{row['hidden_spikes']:.1f}", f"{row['spikes']:.1f}", str(row["latency"])]
            if row["latency"]
            else [""] * 3
        )
        table.add_row(row["recipe"], f"{row['accuracy']:.2f} ± {row['deviation']:.2f} %", *counts)
    return table


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """The ablation table, for a document."""
    lines = ["| | accuracy | hidden spikes | all spikes | steps |", "|---|---|---|---|---|"]
    for row in summary(outcomes):
        counts = (
            f"{row['hidden_spikes']:.1f} | {row['spikes']:.1f} | {row['latency']}"
            if row["latency"]
            else " | | "
        )
        lines.append(f"| {row['recipe']} | {row['accuracy']:.2f} ± {row['deviation']:.2f} % | {counts} |")
    return "\n".join(lines)


def as_dicts(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Plain data for JSON."""
    return [asdict(o) for o in outcomes]
