"""The runs: training steps of a network, one layer over a sweep, and the backward of layer 2 alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..core.errors import ConfigError, MissingDependencyError
from ..core.version import VERSION, commit, installed
from .layers import written
from .measure import Measured, Steps, device_peak_bytes, peak_bytes, saved_bytes, time_alternating
from .problem import Config, make_problem
from .providers import PROVIDERS, get, setup
from .report import show_crossover, show_rows, show_surrogates

DENSITIES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
SIZES = (100, 200, 500, 1000, 2000, 4000)
SURROGATES = (("atan", 2.0), ("fast_sigmoid", 25.0), ("fast_sigmoid", 100.0))
"""snnTorch's default, that of its tutorials, and a steep one."""

_TUTORIAL = Config(inputs=(1, 28, 28), layers=("12C5-MP2", "64C5-MP2", 10), steps=50, batch=32, rate=0.05)
_RECORDED = Config(inputs=(2, 34, 34), layers=("12C5-MP2", "32C5-MP2", 10), batch=32, density=0.005)
_VGG9 = Config(
    inputs=(3, 32, 32),
    layers=(
        *("64C3p1", "64C3p1-MP2", "128C3p1", "128C3p1-MP2"),
        *("256C3p1", "256C3p1", "256C3p1-MP2", 1024, 10),
    ),
    steps=10,
    batch=8,
    density=0.1,
)
CONVOLUTIONAL: dict[str, tuple[Config, ...]] = {
    "tutorial": tuple(replace(_TUTORIAL, density=d) for d in (0.01, 0.05, 0.2)),
    "n-mnist": (_RECORDED,),
    "vgg9": tuple(replace(_VGG9, rate=r) for r in (0.05, 0.2)),
}
"""snnTorch's tutorials 6 and 7, the latter at N-MNIST's density, and a VGG-9 at the rates that such networks show."""

_CONV_PROVIDERS = ("sparse", "sparse-events", "sparse-loop", "snntorch", "norse", "spikingjelly")
CONV_LAYERS: tuple[tuple[tuple[int, int, int], str], ...] = (
    ((2, 34, 34), "12C5-MP2"),
    ((12, 12, 12), "64C5"),
    ((64, 16, 16), "128C3p1"),
)
"""Layers of these networks, for the sweep over density: size of the input, and the layer."""


@dataclass(frozen=True)
class BenchOptions:
    """What the command line sets for every run. ``batch`` None: the protocol's own."""

    batch: int | None = None
    density: float = 0.02
    providers: tuple[str, ...] | None = None
    compiled: bool = False
    reference: bool = False
    rounds: int = 15
    threads: int = 2
    device: str = "cpu"
    peak: bool = True

    def names(self, op: str) -> list[str]:
        """The providers of an op: those named, or all but the opt-in ones that were not asked for."""
        if self.providers is not None:
            for name in self.providers:
                if op not in get(name).ops:
                    able = ", ".join(n for n, p in PROVIDERS.items() if op in p.ops)
                    raise ConfigError(f"provider {name!r} has no {op} benchmark; these have: {able}.")
            return list(self.providers)
        asked = {"compile": self.compiled, "reference": self.reference}
        return [n for n, p in PROVIDERS.items() if op in p.ops and (not p.opt_in or asked.get(n, False))]


def run_network(
    options: BenchOptions, console: Console, steps: Sequence[int], config: Config | None = None
) -> list[dict[str, Any]]:
    """Training steps of 700-200-200-20, for each T in ``steps``; one row a provider."""
    base = config or Config(batch=options.batch or 64, density=options.density, device=options.device)
    rows = []
    for T in steps:
        rows += _run(replace(base, steps=T), options, console)
        show_rows(rows[-len(options.names("network")) :], console, baseline="snntorch")
    return rows


def run_conv(
    network: str,
    options: BenchOptions,
    console: Console,
    *,
    steps: int | None = None,
    density: float | None = None,
    root: str | None = None,
    configs: Sequence[Config] | None = None,
) -> list[dict[str, Any]]:
    """Training steps of convolutional networks, one row a provider.

    Args:
        network: a key of :data:`CONVOLUTIONAL`, or ``"conv"`` for all of them.
        steps, density: in place of those of the networks.
        root: folder of N-MNIST's files: the network of that name gets recordings.

    Raises:
        ConfigError: another network.
    """
    if network not in (*CONVOLUTIONAL, "conv"):
        raise ConfigError(f"no network {network!r}; known: conv, {', '.join(CONVOLUTIONAL)}.")
    if options.providers is None:
        more = tuple(name for name in options.names("network") if get(name).opt_in)
        options = replace(options, providers=_CONV_PROVIDERS + more)
    rows: list[dict[str, Any]] = []
    asked = CONVOLUTIONAL if network == "conv" else {network: CONVOLUTIONAL[network]}
    for name, each in asked.items():
        chosen = [
            replace(
                config,
                steps=steps or config.steps,
                batch=options.batch or config.batch,
                density=density or config.density,
                device=options.device,
                root=root if name == "n-mnist" else None,
            )
            for config in configs or each
        ]
        for config in dict.fromkeys(chosen):  # with a density of one's own some are the same
            rows += _run(config, options, console)
            show_rows(rows[-len(options.names("network")) :], console, baseline="snntorch")
    return rows


def run_s3gd(
    options: BenchOptions,
    console: Console,
    steps: int = 500,
    config: Config | None = None,
    rates: Sequence[float] = (0.03, 0.003),
) -> list[dict[str, Any]]:
    """Backward of the second hidden layer alone, against the dense loop [Perez-Nieves & Goodman 2021].

    N = 200, B_th = 0.2, fast sigmoid of slope 100, B = 256, T = 500; both layers once at 3 % spikes, where 5 % of
    the neuron-steps are active, and once at 0.3 %, where 1.7 % of the first layer's and 1.1 % of the second's are:
    the activity that the publication reports for its data of 500 steps. There is no guard (``min_active=0``).
    """
    base = config or Config(
        op="s3gd",
        layers=(200, 200),
        batch=options.batch or 256,
        density=options.density,
        window=0.2,
        device=options.device,
    )
    rows = []
    for rate in rates:
        rows += _run(replace(base, steps=steps, rate=rate), options, console)
        show_rows(rows[-len(options.names("s3gd")) :], console, baseline="snntorch", phase="backward")
    return rows


def run_surrogates(
    options: BenchOptions, console: Console, steps: Sequence[int] = (100,), config: Config | None = None
) -> list[dict[str, Any]]:
    """The network with the surrogates that people use: ``unroll`` and the unmodified loop against snnTorch's loop.

    What a step costs follows from the share of neuron-steps inside the window, which the surrogate decides.
    """
    if options.providers is None:
        options = replace(options, providers=("sparse", "sparse-loop", "snntorch"))
    base = config or Config(batch=options.batch or 64, density=options.density, device=options.device)
    rows = []
    for T in steps:
        for surrogate, slope in SURROGATES:
            each = replace(base, steps=T, surrogate=surrogate, slope=slope)  # type: ignore[arg-type]
            rows += _run(each, options, console)
    show_surrogates(rows, console)
    return rows


def run_sweep(
    sweep: str,
    options: BenchOptions,
    console: Console,
    points: Iterable[float] | None = None,
    config: Config | None = None,
) -> list[dict[str, Any]]:
    """One layer over input density (700 to 200 neurons), or over its size N (N inputs, smaller T and B).

    Compares the op over events, the op after a dense product, its own choice, and the other libraries.
    """
    if sweep == "density":
        base = config or Config(op="layer", layers=(200,), batch=options.batch or 64, device=options.device)
        configs = [replace(base, density=d) for d in points or DENSITIES]
    else:
        base = config or Config(
            op="layer", steps=50, batch=options.batch or 16, density=options.density, device=options.device
        )
        configs = [replace(base, inputs=int(n), layers=(int(n),)) for n in points or SIZES]
    rows = []
    for each in configs:
        rows += _run(each, options, console)
    show_crossover(rows, sweep, console)
    return rows


def run_conv_sweep(
    options: BenchOptions,
    console: Console,
    points: Sequence[float] | None = None,
    layers: Sequence[tuple[tuple[int, int, int], str]] = CONV_LAYERS,
    steps: int = 20,
) -> list[dict[str, Any]]:
    """:func:`run_sweep` over input density for each of several convolutions with their pools and neurons."""
    rows = []
    for size, layer in layers:
        base = Config(
            op="layer",
            inputs=size,
            layers=(layer,),
            steps=steps,
            batch=options.batch or 16,
            device=options.device,
        )
        console.print(written(size, (layer,)), highlight=False)
        rows += run_sweep("density", options, console, points, base)
    return rows


def _run(config: Config, options: BenchOptions, console: Console) -> list[dict[str, Any]]:
    """All providers on one config."""
    torch.set_num_threads(options.threads)
    names = options.names(config.op)
    found: dict[str, Measured] = {}
    cases: dict[str, Steps] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=None)

        def tell(step: str, **changes: Any) -> None:
            line = f"{config.op} T={config.steps} B={config.batch}: {step}"
            progress.update(task, description=line, **changes)
            if not console.is_terminal:  # a log has no bar: a line for each step
                console.print(line, highlight=False, soft_wrap=True)

        tell("input and weights")
        problem = make_problem(config)
        rates = problem.rates
        density = config.density if config.root is None else float(problem.x.mean())
        for name in names:
            tell(f"preparing {name}")
            try:
                cases[name] = setup(config, name)
            except MissingDependencyError as error:
                found[name] = Measured(skipped=str(error))
        if cases:
            tell(f"warm-up, then {options.rounds} rounds of all", total=options.rounds, completed=0)
            timings = time_alternating(
                cases, options.rounds, config.device, partial(progress.update, task, advance=1)
            )
        for name, steps in cases.items():
            tell(f"memory of {name}")
            compiled = name == "compile"  # hooks and a fresh process would each compile again
            # a loop is not recorded while hooks on saved tensors are in force: they would count upstream's
            saved = None if compiled or name == "sparse-loop" else _saved(steps)
            peak = None
            if options.peak and config.device != "cpu":
                peak = device_peak_bytes(steps)
            elif options.peak and not compiled:
                peak = peak_bytes(config, name, options.threads)
            found[name] = Measured(timings[name], saved, peak)
    return [_row(config, density, rates, name, found[name], options.threads) for name in names]


def _row(
    config: Config, density: float, rates: tuple[float, ...], provider: str, measured: Measured, threads: int
) -> dict[str, Any]:
    """One provider on one config, with all that is needed to read the figure on its own."""
    library = get(provider).library
    row: dict[str, Any] = {
        "op": config.op,
        "provider": provider,
        "about": get(provider).about,
        "skipped": measured.skipped,
        "shape": {
            "T": config.steps,
            "B": config.batch,
            "inputs": config.inputs,
            "layers": list(config.layers),
        },
        "density": density,
        "input": "Bernoulli" if config.root is None else "N-MNIST",
        "layer_rates": [round(r, 5) for r in rates],
        "window": config.window,
        "surrogate": f"{config.surrogate}({config.slope:g})",
        "dtype": "float32",
        "device": config.device,
        "threads": threads,
        "versions": {
            "snn-sparse-plugin": VERSION,
            "torch": torch.__version__,
            library: installed(library),
        },
        "commit": commit(),
    }
    if measured.timing is not None:
        for phase, spread in measured.timing._asdict().items():
            row[f"{phase}_ms"] = {name: round(value, 4) for name, value in spread._asdict().items()}
    row["saved_bytes"] = measured.saved
    row["saved_bytes_per_neuron_step"] = (
        None if measured.saved is None else round(measured.saved / config.neuron_steps, 4)
    )
    row["peak_bytes"] = measured.peak
    return row


def _saved(steps: Steps) -> int:
    count, out = saved_bytes(steps.forward, steps.kept)
    steps.backward(out)
    for parameter in steps.parameters:
        parameter.grad = None
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return count
