"""``snn-sparse experiment s3gd | s3gd-conv``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ...core.errors import ConfigError
from .common import Device, Threads, numbers, readable_errors, short

if TYPE_CHECKING:
    from ...experiments import Study

app = typer.Typer(
    name="experiment",
    help="Published experiments on real data.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


class DataName(str, Enum):
    """Choices of ``--data``."""

    fashion_mnist = "fashion-mnist"
    n_mnist = "n-mnist"
    shd = "shd"
    digits = "digits"


class ConvDataName(str, Enum):
    """Choices of ``--data``."""

    fashion_mnist = "fashion-mnist"
    n_mnist = "n-mnist"
    digits = "digits"


# What both experiments take.
Root = Annotated[Path | None, typer.Option(help="Folder of the data's files; digits need none.")]
Out = Annotated[
    Path,
    typer.Option(help="Folder of logs, checkpoints, results and the report; an old one is gone on with."),
]
Epochs = Annotated[int | None, typer.Option(min=1, help="Epochs of part train.")]
Seeds = Annotated[str, typer.Option(help="Seeds, separated by commas; each is trained sparse and dense.")]
Threshold = Annotated[float | None, typer.Option(help="B_th; published: 0.2.")]
Guard = Annotated[
    bool,
    typer.Option("--guard", help="This package's guard (default min_active), which the publication lacks."),
]
Batch = Annotated[int | None, typer.Option(min=1, help="Batch size B.")]
LearningRate = Annotated[float | None, typer.Option(help="Of Adam.")]
Samples = Annotated[int, typer.Option(min=0, help="Training samples to use; 0 is all.")]
Thresholds = Annotated[str, typer.Option(help="B_th of its sweep.", show_default="0.05, 0.1, 0.2, 0.4, 0.8")]
SweepEpochs = Annotated[int, typer.Option(min=1, help="Epochs of the networks of a sweep.")]
Rounds = Annotated[int, typer.Option(min=1, help="Alternating rounds of a time, at most.")]
Budget = Annotated[float, typer.Option(min=0, help="Seconds for a row of times; it gets fewer rounds then.")]
Title = Annotated[str | None, typer.Option(help="Name of the data in the report.")]


@app.callback()
def _group() -> None:
    """One command for each publication."""


def s3gd(
    context: typer.Context,
    data: Annotated[DataName, typer.Option(help="Which data.")] = DataName.digits,
    root: Root = None,
    out: Out = Path("s3gd"),
    part: Annotated[
        str,
        typer.Option(
            help="all, or some of train, hidden, threshold, depth, gradients, speed, epoch, separated by commas."
        ),
    ] = "all",
    epochs: Epochs = None,
    seeds: Seeds = "0,1,2",
    hidden: Annotated[
        int | None, typer.Option(min=1, help="Neurons N of a hidden layer; published: 200.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Hidden layers; published: 2.")] = None,
    threshold: Threshold = None,
    guard: Guard = False,
    batch: Batch = None,
    learning_rate: LearningRate = None,
    samples: Samples = 0,
    sizes: Annotated[
        str,
        typer.Option(help="N of the sweep over hidden size.", show_default="100, 200, 400, 600, 800, 1000"),
    ] = "100,200,400,600,800,1000",
    thresholds: Thresholds = "0.05,0.1,0.2,0.4,0.8",
    deep: Annotated[str, typer.Option(help="Layers and N of the deep network.")] = "5,300",
    sweep_epochs: SweepEpochs = 1,
    rounds: Rounds = 7,
    budget: Budget = 20,
    title: Title = None,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Sparse Spiking Gradient Descent: every table and figure.

    Trains the network of Perez-Nieves & Goodman (2021, section 3) sparse and dense on the same seeds and measures
    activity, gradients, time and memory. Killed at any moment, the same command goes on where it was; finished parts
    are not done again.
    """
    with readable_errors(context):
        from ...experiments import Study, settings_of

        depth = numbers(deep, "--deep", int)
        if len(depth) != 2:
            raise ConfigError(f"--deep takes the number of layers and N, such as 5,300; got {deep!r}.")
        changes = _changes(epochs, layers, threshold, guard, batch, learning_rate) | {"hidden": hidden}
        study = Study(
            settings=settings_of(data.value).changed(**changes),
            out=out,
            root=root,
            seeds=numbers(seeds, "--seeds", int),
            samples=samples,
            title=title,
            sizes=numbers(sizes, "--sizes", int),
            thresholds=numbers(thresholds, "--thresholds", float),
            deep=(depth[0], depth[1]),
            sweep_epochs=sweep_epochs,
            rounds=rounds,
            budget=budget,
            device=device,
            threads=threads,
        )
        _run(study, part)


def s3gd_conv(
    context: typer.Context,
    data: Annotated[ConvDataName, typer.Option(help="Which data.")] = ConvDataName.digits,
    root: Root = None,
    out: Out = Path("s3gd-conv"),
    part: Annotated[
        str,
        typer.Option(help="all, or some of train, threshold, gradients, speed, epoch, separated by commas."),
    ] = "all",
    epochs: Epochs = None,
    seeds: Seeds = "0,1,2",
    channels: Annotated[int | None, typer.Option(min=1, help="Channels of a convolution.")] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Convolutions, each with a max-pool and neurons.")
    ] = None,
    kernel: Annotated[int | None, typer.Option(min=1, help="Side of the kernel, odd.")] = None,
    threshold: Threshold = None,
    guard: Guard = False,
    batch: Batch = None,
    learning_rate: LearningRate = None,
    samples: Samples = 0,
    thresholds: Thresholds = "0.05,0.1,0.2,0.4,0.8",
    sweep_epochs: SweepEpochs = 1,
    rounds: Rounds = 7,
    budget: Budget = 20,
    quick: Annotated[
        bool, typer.Option("--quick", help="One epoch of a few samples and channels, to see that it runs.")
    ] = False,
    title: Title = None,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """The same with spiking convolutions and max-pools.

    Each convolution is followed by a max-pool and its neurons, the last by a linear readout; events are added row by
    row in both passes. On N-MNIST there are two convolutions over 2 × 34 × 34 events.
    """
    with readable_errors(context):
        from ...experiments import Study, conv_settings_of

        changes = _changes(epochs, layers, threshold, guard, batch, learning_rate)
        changes |= {"hidden": channels, "kernel": kernel}
        settings = conv_settings_of(data.value)
        if quick:
            settings = settings.changed(epochs=1, hidden=4, batch=16)  # type: ignore[assignment]
        study = Study(
            settings=settings.changed(**changes),
            out=out,
            root=root,
            seeds=numbers(seeds, "--seeds", int),
            samples=samples or (64 if quick else 0),
            title=title,
            thresholds=numbers(thresholds, "--thresholds", float)[: 1 if quick else None],
            sweep_epochs=sweep_epochs,
            rounds=1 if quick else rounds,
            budget=budget,
            device=device,
            threads=threads,
        )
        _run(study, part)


app.command(short_help=short(s3gd))(s3gd)
app.command("s3gd-conv", short_help=short(s3gd_conv))(s3gd_conv)


def _changes(
    epochs: int | None,
    layers: int | None,
    threshold: float | None,
    guard: bool,
    batch: int | None,
    learning_rate: float | None,
) -> dict[str, Any]:
    """What differs from the published settings; None is left as published."""
    from ...core.config import SparseConfig

    return {
        "epochs": epochs,
        "layers": layers,
        "threshold": threshold,
        "min_active": SparseConfig().min_active if guard else None,
        "batch": batch,
        "learning_rate": learning_rate,
    }


def _run(study: Study, text: str) -> None:
    from ...experiments import run_study
    from ...experiments.parts import parts_of

    console = Console()
    parts = list(parts_of(study.settings)) if text == "all" else [name.strip() for name in text.split(",")]
    report = run_study(study, parts, console)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)
