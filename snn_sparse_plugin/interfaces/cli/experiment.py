"""``snn-sparse experiment s3gd | s3gd-conv``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ...core.errors import ConfigError
from .common import Device, Threads, numbers, readable_errors

if TYPE_CHECKING:
    from ...experiments import Study

app = typer.Typer(name="experiment", help="Published experiments, remade on real data.", no_args_is_help=True)


class DataName(str, Enum):
    """Choices of ``--data``."""

    fashion_mnist = "fashion-mnist"
    n_mnist = "n-mnist"
    shd = "shd"
    digits = "digits"


@app.callback()
def _group() -> None:
    """One command for each publication."""


@app.command()
def s3gd(
    context: typer.Context,
    data: Annotated[DataName, typer.Option(help="Which data.")] = DataName.digits,
    root: Annotated[Path | None, typer.Option(help="Folder of the data's files; digits need none.")] = None,
    out: Annotated[
        Path,
        typer.Option(help="Folder of logs, checkpoints, results and the report; an old one is gone on with."),
    ] = Path("s3gd"),
    part: Annotated[
        str, typer.Option(help="all, or of train,hidden,threshold,depth,gradients,speed,epoch those named.")
    ] = "all",
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of part train.")] = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds, comma-separated; each is trained sparse and dense.")
    ] = "0,1,2",
    hidden: Annotated[
        int | None, typer.Option(min=1, help="Neurons N of a hidden layer; published: 200.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Hidden layers; published: 2.")] = None,
    threshold: Annotated[float | None, typer.Option(help="B_th; published: 0.2.")] = None,
    guard: Annotated[
        bool,
        typer.Option(
            "--guard", help="This package's guard (default min_active), which the publication lacks."
        ),
    ] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size B; published: 256.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Training samples to use; 0 is all.")] = 0,
    sizes: Annotated[str, typer.Option(help="N of the sweep over hidden size.")] = "100,200,400,600,800,1000",
    thresholds: Annotated[str, typer.Option(help="B_th of its sweep.")] = "0.05,0.1,0.2,0.4,0.8",
    deep: Annotated[str, typer.Option(help="Layers and N of the deep network.")] = "5,300",
    sweep_epochs: Annotated[int, typer.Option(min=1, help="Epochs of the networks of the sweeps.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Alternating rounds of a time, at most.")] = 7,
    budget: Annotated[
        float, typer.Option(min=0, help="Seconds for a row of times; it gets fewer rounds then.")
    ] = 20,
    title: Annotated[str | None, typer.Option(help="Name of the data in the report.")] = None,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Sparse Spiking Gradient Descent (Perez-Nieves & Goodman 2021): every table and figure of its section 3.

    Trains the published network sparse and dense on the same seeds and measures activity, gradients, time and
    memory. Killed at any moment, the same command goes on where it was; finished parts are not done again.
    """
    with readable_errors(context):
        from ...core.config import SparseConfig
        from ...experiments import Study, settings_of

        changes: dict[str, Any] = {
            "epochs": epochs,
            "hidden": hidden,
            "layers": layers,
            "threshold": threshold,
            "min_active": SparseConfig().min_active if guard else None,
            "batch": batch,
            "learning_rate": learning_rate,
        }
        depth = numbers(deep, "--deep", int)
        if len(depth) != 2:
            raise ConfigError(f"--deep takes the number of layers and N, such as 5,300; got {deep!r}.")
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


class ConvDataName(str, Enum):
    """Choices of ``--data``."""

    fashion_mnist = "fashion-mnist"
    n_mnist = "n-mnist"
    digits = "digits"


@app.command("s3gd-conv")
def s3gd_conv(
    context: typer.Context,
    data: Annotated[ConvDataName, typer.Option(help="Which data.")] = ConvDataName.digits,
    root: Annotated[Path | None, typer.Option(help="Folder of the data's files; digits need none.")] = None,
    out: Annotated[
        Path,
        typer.Option(help="Folder of logs, checkpoints, results and the report; an old one is gone on with."),
    ] = Path("s3gd-conv"),
    part: Annotated[
        str, typer.Option(help="all, or of train,threshold,gradients,speed,epoch those named.")
    ] = "all",
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of part train.")] = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds, comma-separated; each is trained sparse and dense.")
    ] = "0,1,2",
    channels: Annotated[int | None, typer.Option(min=1, help="Channels of a convolution.")] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Convolutions, each with a max-pool and neurons.")
    ] = None,
    kernel: Annotated[int | None, typer.Option(min=1, help="Side of the kernel, odd.")] = None,
    threshold: Annotated[float | None, typer.Option(help="B_th; published: 0.2.")] = None,
    guard: Annotated[
        bool, typer.Option("--guard", help="This package's guard (default min_active), as in s3gd.")
    ] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size B.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Training samples to use; 0 is all.")] = 0,
    thresholds: Annotated[str, typer.Option(help="B_th of its sweep.")] = "0.05,0.1,0.2,0.4,0.8",
    sweep_epochs: Annotated[int, typer.Option(min=1, help="Epochs of the networks of the sweep.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Alternating rounds of a time, at most.")] = 7,
    budget: Annotated[
        float, typer.Option(min=0, help="Seconds for a row of times; it gets fewer rounds then.")
    ] = 20,
    quick: Annotated[
        bool, typer.Option("--quick", help="One epoch of a few samples and channels, to see that it runs.")
    ] = False,
    title: Annotated[str | None, typer.Option(help="Name of the data in the report.")] = None,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """The same with spiking convolutions, max-pools and a linear readout.

    Each convolution is followed by a max-pool and its neurons; events are added row by row in both passes. On N-MNIST
    there are two of them over 2 × 34 × 34 events.
    """
    with readable_errors(context):
        from ...core.config import SparseConfig
        from ...experiments import Study, conv_settings_of

        changes: dict[str, Any] = {
            "epochs": epochs,
            "hidden": channels,
            "layers": layers,
            "kernel": kernel,
            "threshold": threshold,
            "min_active": SparseConfig().min_active if guard else None,
            "batch": batch,
            "learning_rate": learning_rate,
        }
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


def _run(study: Study, text: str) -> None:
    from ...experiments import run_study
    from ...experiments.parts import parts_of

    console = Console()
    parts = list(parts_of(study.settings)) if text == "all" else [name.strip() for name in text.split(",")]
    report = run_study(study, parts, console)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)
