"""``snn-sparse demo | bench | tune | warm``."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ...core.errors import ConfigError, UnsupportedError
from ...files import write_text
from .common import (
    Device,
    Epochs,
    JsonFlag,
    Threads,
    TrainingImages,
    check_writable,
    consoles,
    numbers,
    readable_errors,
)


class DataName(str, Enum):
    """Choices of ``--data``."""

    digits = "digits"
    mnist = "mnist"
    fashion_mnist = "fashion-mnist"


class LibraryName(str, Enum):
    """Choices of ``--library``."""

    snntorch = "snntorch"
    norse = "norse"


class SweepName(str, Enum):
    """Choices of ``--sweep``."""

    density = "density"
    size = "size"


class ProtocolName(str, Enum):
    """Choices of ``--protocol``."""

    network = "network"
    surrogates = "surrogates"
    s3gd = "s3gd"


class NetworkName(str, Enum):
    """Choices of ``--network``."""

    linear = "linear"
    conv = "conv"
    tutorial = "tutorial"
    n_mnist = "n-mnist"
    vgg9 = "vgg9"


def demo(
    context: typer.Context,
    data: Annotated[DataName, typer.Option(help="Which images.")] = DataName.digits,
    root: Annotated[
        Path | None, typer.Option(help="Folder of the idx files of mnist or fashion-mnist.")
    ] = None,
    library: Annotated[LibraryName, typer.Option(help="Whose neurons.")] = LibraryName.snntorch,
    epochs: Epochs = 8,
    samples: TrainingImages = 6000,
    steps: Annotated[int, typer.Option(min=10, help="Time steps T.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Batch size B.")] = 64,
    hidden: Annotated[int, typer.Option(min=1, help="Neurons in each of the two hidden layers.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    threads: Threads = 0,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
    as_json: JsonFlag = False,
) -> None:
    """Train a network on real images, sparse and dense, and compare accuracy, time and memory."""
    with readable_errors(context):
        from ..demo import DemoOptions, run_demo, show

        check_writable(out)
        console, emit = consoles(as_json)
        options = DemoOptions(
            data=data.value,
            root=root,
            library=library.value,
            epochs=epochs,
            samples=samples,
            steps=steps,
            batch=batch,
            hidden=hidden,
            seed=seed,
            threads=threads,
            out=out,
        )
        result = run_demo(options, console)
        show(result, console)
        if as_json:
            emit(result.as_dict())


def bench(
    context: typer.Context,
    protocol: Annotated[
        ProtocolName,
        typer.Option(
            help="network: whole steps; surrogates: with the surrogates people use; s3gd: backward of layer 2."
        ),
    ] = ProtocolName.network,
    network: Annotated[
        NetworkName,
        typer.Option(
            help="linear: 700-200-200-20; conv: the convolutional tutorial, n-mnist and vgg9, or one of them."
        ),
    ] = NetworkName.linear,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder of N-MNIST's files: network n-mnist computes on recordings."),
    ] = None,
    sweep: Annotated[
        SweepName | None, typer.Option(help="Instead: a layer over input density or over size.")
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Time steps T; repeat for several. Default: 100 and 500, or its own."),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size B.")] = None,
    density: Annotated[
        float | None,
        typer.Option(
            min=1e-4, max=1.0, help="Input spikes per input and step. Default: 0.02, or the network's own."
        ),
    ] = None,
    providers: Annotated[
        str | None, typer.Option(help="Separated by commas; default: all but the opt-in ones.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Add torch.compile of snnTorch's loop: minutes to compile.")
    ] = False,
    reference: Annotated[bool, typer.Option("--reference", help="Add the slow reference backend.")] = False,
    points: Annotated[
        str | None, typer.Option(help="Points of the sweep, separated by commas: densities, or sizes N.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Alternating rounds; medians are over them.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads for everyone.")] = 2,
    device: Device = "cpu",
    peak: Annotated[bool, typer.Option(help="Measure peak memory, each provider in its own process.")] = True,
    out: Annotated[
        Path | None, typer.Option("--json", help="Write rows as JSON to FILE; - is stdout.")
    ] = None,
) -> None:
    """Compare with snnTorch, Norse and SpikingJelly in one alternating run."""
    with readable_errors(context):
        from ... import bench as suite

        to_stdout = out is not None and str(out) == "-"
        if out is not None and not to_stdout:
            check_writable(out)
        console, emit = consoles(to_stdout)
        options = suite.BenchOptions(
            batch=batch,
            density=0.02 if density is None else density,
            providers=tuple(p.strip() for p in providers.split(",")) if providers else None,
            compiled=compiled,
            reference=reference,
            rounds=rounds,
            threads=threads,
            device=device,
            peak=peak,
        )
        convolutional = network is not NetworkName.linear
        if convolutional and protocol is not ProtocolName.network:
            raise ConfigError(f"--protocol {protocol.value} has a network of its own: leave --network away.")
        if convolutional and sweep is SweepName.size:
            raise ConfigError("--sweep size is one of linear layers: leave --network away.")
        if root is not None and network not in (NetworkName.n_mnist, NetworkName.conv):
            raise ConfigError("--root is read by --network n-mnist alone.")
        if convolutional and sweep is not None:
            chosen = None if points is None else numbers(points, "--points", float)
            rows = suite.run_conv_sweep(options, console, chosen, steps=steps[0] if steps else 20)
        elif convolutional:
            rows = []
            for T in steps or (None,):
                rows += suite.run_conv(
                    network.value,
                    options,
                    console,
                    steps=T,
                    density=density,
                    root=None if root is None else str(root),
                )
        elif sweep is not None:
            rows = suite.run_sweep(
                sweep.value, options, console, None if points is None else numbers(points, "--points", float)
            )
        elif protocol is ProtocolName.s3gd:
            rows = suite.run_s3gd(options, console, steps[0] if steps else 500)
        elif protocol is ProtocolName.surrogates:
            rows = suite.run_surrogates(options, console, tuple(steps or (100,)))
        else:
            rows = suite.run_network(options, console, tuple(steps or (100, 500)))
        if to_stdout:
            emit(rows)
        elif out is not None:
            write_text(out, json.dumps(rows, indent=2) + "\n")
            console.print(f"{len(rows)} rows written to {out}", soft_wrap=True)


def tune(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Measure on this machine's GPU how to multiply spikes fastest, and keep it for later runs."""
    with readable_errors(context):
        from ..tune import tune as measured

        console, emit = consoles(as_json)
        found = measured(lambda line: console.print(line, highlight=False))
        if as_json:
            emit(found)
        else:
            console.print(f"written to {found['file']}", highlight=False, soft_wrap=True)


def warm(
    context: typer.Context,
    everything: Annotated[
        bool, typer.Option("--all", help="Rarer neurons, e-prop and time-to-first-spike coding too.")
    ] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="The kernels of this machine's GPU instead.")] = False,
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0 is one for each core.")] = 0,
) -> None:
    """Compile the kernels of the usual neurons ahead, for images and CI."""
    with readable_errors(context):
        from ..warm import OTHERS, USUAL, run_warm

        console, _ = consoles(False)
        tasks = (*USUAL, *OTHERS) if everything else USUAL
        count, folder = run_warm(console, tasks, gpu, jobs)
        if gpu:
            console.print(f"{count} neurons' kernels are in Triton's cache", soft_wrap=True)
        elif folder is None:
            raise UnsupportedError(
                "compiled kernels are kept nowhere, as no folder can be written: set NUMBA_CACHE_DIR to one that can."
            )
        else:
            files = list(folder.glob("*.nbc"))
            size = sum(file.stat().st_size for file in files) / 1e6
            console.print(
                f"{len(files)} kernels, {size:.1f} MB, in {folder}", highlight=False, soft_wrap=True
            )
