"""``snn-sparse ttfs report | verify | ablation``."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ...core.errors import ConfigError
from .common import Epochs, JsonFlag, Threads, TrainingImages, readable_errors, short

app = typer.Typer(
    name="ttfs", help="Time-to-first-spike networks.", no_args_is_help=True, rich_markup_mode=None
)


class DataName(str, Enum):
    """Choices of ``--data``."""

    digits = "digits"
    mnist = "mnist"
    fashion_mnist = "fashion-mnist"
    cifar10 = "cifar10"
    cifar100 = "cifar100"


class FormName(str, Enum):
    """Choices of ``--form``."""

    paper = "paper"
    gaussian = "gaussian"


Model = Annotated[Path, typer.Argument(help="A file written by TTFSNetwork.save.")]
Data = Annotated[DataName, typer.Option(help="Which images.")]
Root = Annotated[Path | None, typer.Option(help="Folder of the image files.")]
Samples = Annotated[int, typer.Option(min=0, help="Test images to use; 0 is all.")]
Early = Annotated[int | None, typer.Option(min=1, help="Fire this many steps after the inputs do.")]


def _network_and_images(model: Path, data: DataName, root: Path | None, samples: int) -> tuple[Any, Any, Any]:
    from ...data import load_images
    from ...layers.ttfs import TTFSNetwork

    net = TTFSNetwork.load(model)
    images = load_images(data.value, root)
    x, y = images.test_x, images.test_y
    if x[0].numel() != net.input_neurons:
        raise ConfigError(
            f"{data.value} images have {x[0].numel()} pixels, the network in {model} takes {net.input_neurons}."
        )
    n = samples or len(y)
    return net, x[:n].view(-1, *net.input_shape), y[:n]


def report(
    context: typer.Context,
    model: Model,
    data: Data = DataName.digits,
    root: Root = None,
    samples: Samples = 1000,
    early_firing: Early = None,
    spikes: Annotated[float | None, typer.Option(min=1e-9, help="Spikes of the energy reference.")] = None,
    steps: Annotated[float | None, typer.Option(min=1e-9, help="Steps of the energy reference.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Count spikes, latency, operations and relative energy of a saved network on test images."""
    with readable_errors(context):
        from ...layers.ttfs.report import EnergyReference

        if (spikes is None) != (steps is None):
            raise ConfigError("an energy reference needs both --spikes and --steps.")
        net, x, y = _network_and_images(model, data, root, samples)
        options: dict[str, Any] = (
            {} if spikes is None or steps is None else {"reference": EnergyReference(spikes, steps)}
        )
        found = net.report(x, labels=y, early_firing=early_firing, **options)
        print(json.dumps(found.as_dict(), indent=2) if as_json else found)


def verify(
    context: typer.Context,
    model: Model,
    data: Data = DataName.digits,
    root: Root = None,
    samples: Samples = 0,
    exact_grid: Annotated[bool, typer.Option(help="Weights and kernels on the binary grid.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Compare every spike time of a saved network with the same weights run as activations."""
    with readable_errors(context):
        from rich.progress import Progress

        net, x, _ = _network_and_images(model, data, root, samples)
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("comparing", total=len(x))
            found = net.verify(
                x, exact_grid=exact_grid, progress=lambda done, total: bar.update(task, completed=done)
            )
        print(json.dumps(asdict(found), indent=2) if as_json else found)
    if exact_grid and found.equal < 1:
        raise typer.Exit(1)


def ablation(
    context: typer.Context,
    data: Data = DataName.digits,
    root: Root = None,
    seeds: Annotated[int, typer.Option(min=1, help="Networks of each row.")] = 5,
    epochs: Epochs = 30,
    samples: TrainingImages = 0,
    batch: Annotated[int, typer.Option(min=2, help="Batch size B.")] = 64,
    window: Annotated[int, typer.Option(min=2, max=255, help="Steps in a window.")] = 32,
    width: Annotated[int, typer.Option(min=1, help="Channels of the first convolution (28×28 images).")] = 32,
    depth: Annotated[int, typer.Option(help="VGG-9, 11 or 16 (CIFAR).")] = 16,
    flip: Annotated[bool, typer.Option(help="Mirror images at random.")] = False,
    shift: Annotated[int, typer.Option(min=0, help="Move images by up to so many pixels.")] = 0,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Of the synapses.")] = 0.0,
    label_smoothing: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the cross entropy.")] = 0.0,
    tr: Annotated[float, typer.Option(min=0.0, help="Weight of TR.")] = 1e-3,
    tb: Annotated[
        list[float] | None, typer.Option(help="Weight of TB; repeat for more rows. Default: 0.003 and 0.01.")
    ] = None,
    form: Annotated[FormName, typer.Option(help="Form of TB.")] = FormName.paper,
    threads: Threads = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda, for training.")] = "cpu",
    as_json: JsonFlag = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table for a document.")] = False,
) -> None:
    """Train ReLU, SM, +SR, +TR and +TB networks and print the ablation table."""
    with readable_errors(context):
        from ...core.config import check_device
        from ...data import load_images
        from ...layers.ttfs import ablation as suite
        from ...layers.ttfs import networks
        from ...layers.ttfs.recipes import TrainOptions

        check_device(device)
        images = load_images(data.value, root)
        if samples:  # the accuracy is that of all test images
            images = replace(images, train_x=images.train_x[:samples], train_y=images.train_y[:samples])
        options = TrainOptions(
            epochs=epochs,
            batch=batch,
            weight_decay=weight_decay,
            label_smoothing=label_smoothing,
            window=window,
            flip=flip,
            shift=shift,
            threads=threads,
        )
        rows = suite.recipes(tr, tuple(tb or (0.003, 0.01)), form.value)
        network = {
            "digits": networks.digits_mlp,
            "mnist": lambda: networks.small_conv(width),
            "fashion-mnist": lambda: networks.small_conv(width),
        }.get(data.value, lambda: networks.vgg(depth, images.classes))
        console = Console(stderr=as_json or as_markdown)
        found = suite.run_ablation(
            network, images, rows, options, seeds=seeds, console=console, device=device
        )
        if as_json:
            print(json.dumps(suite.as_dicts(found), indent=2))
        elif as_markdown:
            print(suite.as_markdown(found))
        else:
            console.print(suite.as_table(found, f"{data.value}, {seeds} seeds, {epochs} epochs"))


for command in (report, verify, ablation):
    app.command(short_help=short(command))(command)
