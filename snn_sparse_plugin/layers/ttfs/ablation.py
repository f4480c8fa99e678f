"""The ablation of the training methods: SM, +SR, +TR, +TB at two weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from ...core.errors import ConfigError
from ...data import ImageData
from .mapping import to_snn
from .recipes import Recipe, TrainOptions, accuracy, build, train
from .training import hidden_layers


def recipes(tr: float = 1e-3, tb: Sequence[float] = (0.003, 0.01), form: str = "paper") -> list[Recipe]:
    """The rows of the ablation table, the ReLU network first.

    Example:
        >>> [r.name for r in recipes()]
        ['ReLU', 'SM', '+SR', '+TR', '+TB 0.003', '+TB 0.01']
    """
    rows = [Recipe("ReLU", coding=False), Recipe("SM"), Recipe("+SR", relax=0.5)]
    rows.append(replace(rows[-1], name="+TR", tr=tr))
    return rows + [replace(rows[3], name=f"+TB {weight:g}", tb=weight, form=form) for weight in tb]


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
