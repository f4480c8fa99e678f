"""``snn-sparse warm``: the kernels of the usual neurons, compiled before anybody waits for them.

Each neuron trains for a few steps in every way that has kernels of its own. numba compiles one kernel at a time in a
process, so the neurons are shared among processes; what they compile is on disk for all that come later.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from ..core import registry
from ..core.errors import UnsupportedError
from ..fusion.sequence import unroll
from ..mode import sparse_mode


class Task(NamedTuple):
    """What one process compiles: a neuron of a library, with one of its options, or what a function runs."""

    library: str
    name: str
    option: str = ""


USUAL = (
    Task("", "convolutions"),
    Task("", "events and single steps"),
    *(Task("snntorch", name) for name in ("Leaky", "Synaptic", "RLeaky")),
    *(Task("snntorch", "Leaky", f"reset_mechanism={reset}") for reset in ("zero", "none")),
    *(Task("norse", name) for name in ("LIFCell", "LIFRecurrentCell", "LICell")),
)
OTHERS = (
    *(Task("snntorch", name) for name in ("RSynaptic", "Alpha", "Lapicque")),
    *(Task("snntorch", name, "reset_mechanism=zero") for name in ("Synaptic", "RLeaky")),
    *(Task("norse", name) for name in ("LIFBoxCell", "LIFExCell", "LIFAdExCell")),
    *(Task("", name) for name in ("e-prop", "time-to-first-spike coding")),
)

FEW = 0.01  # half-width of a window in which few neurons are active, so that these are listed
STEPS, BATCH, NEURONS = 3, 2, 4  # an example has as many neurons


def run_warm(
    console: Console, tasks: Sequence[Task] = USUAL, gpu: bool = False, jobs: int = 0
) -> tuple[int, Path | None]:
    """Compile, with a bar: -> how many tasks there were, and the folder of the CPU's kernels.

    Args:
        tasks: those of a library that is not installed are left out, for a GPU also those of no library.
        gpu: the kernels of this machine's GPU instead of the CPU's, in one process.
        jobs: processes; 0 is one for each core.

    Raises:
        UnsupportedError: ``gpu``, and torch sees none.
    """
    from ..backends.cpu.jit import cache_folder

    if gpu and not torch.cuda.is_available():
        raise UnsupportedError("--gpu compiles for the GPU of this machine, but torch sees none.")
    chosen = [task for task in tasks if (find_spec(task.library) if task.library else not gpu)]
    jobs = 1 if gpu else min(jobs or os.cpu_count() or 1, len(chosen))
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("compiling kernels", total=len(chosen))
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            running = {pool.submit(compile_for, task, gpu): task for task in chosen}
            for count, done in enumerate(as_completed(running), start=1):
                done.result()
                progress.advance(bar)
                if not console.is_terminal:  # a log has no bar: a line for each task
                    name = " ".join(filter(None, running[done]))
                    console.print(
                        f"compiled {count} of {len(chosen)}: {name}", highlight=False, soft_wrap=True
                    )
    return len(chosen), cache_folder()


def compile_for(task: Task, gpu: bool = False) -> None:
    """Train for a few steps: exact and with a window, on events and on dense input, in float32."""
    torch.set_num_threads(1)
    if task.library:
        _neuron(task, "cuda" if gpu else "cpu")
    else:
        _OF_NO_LIBRARY[task.name]()


def _neuron(task: Task, device: str) -> None:
    example = registry.load("adapters", task.library).examples()[task.name]
    hidden = {"init_hidden": True} if task.library == "snntorch" else {}

    def neuron() -> nn.Module:
        made = example.with_option(task.option, **hidden) if task.option else example.build(**hidden)
        return made  # type: ignore[no-any-return]

    for threshold, dense, by_spikes in product((None, FEW), (False, True), (False, True)):
        torch.manual_seed(0)
        first, second = (nn.Linear(NEURONS, NEURONS) for _ in range(2))
        net = nn.Sequential(first, neuron(), second, neuron()).to(device)
        x = torch.rand(STEPS, BATCH, NEURONS, device=device)
        with sparse_mode(backprop_threshold=threshold, min_active=0.0):
            out = unroll(net, x if dense else (x < 0.5).float())
            read = out.spikes if by_spikes or out.mem is None else out.mem
            read.sum().backward()


def _events_and_steps() -> None:
    from ..backends.cpu.ahead import Ahead
    from ..backends.cpu.conversions import events_from_dense, fire, passed
    from ..core.surrogates import Surrogate

    x = torch.eye(NEURONS).repeat(STEPS, 1, 1)
    ahead = Ahead(x, STEPS, 1.0)
    ahead.finish(STEPS)
    events_from_dense(x, ahead)
    events_from_dense(2 * x)
    spikes, kept, *_ = fire(x[0], NEURONS, FEW, 0.0)
    passed(spikes, x[0], kept, Surrogate("heaviside"))


def _convolutions() -> None:
    from ..core.dynamics import NeuronParams
    from ..ops.spiking_conv import convolve, pool_events, spiking_conv

    channels = 16  # with as many, events win below a share of spikes that these inputs do not reach
    x = (torch.rand(STEPS, BATCH, channels, 8, 8) < FEW).float()
    first, second = (torch.rand(channels, channels, 3, 3).requires_grad_() for _ in range(2))
    for threshold, pool in product((None, FEW), (None, nn.MaxPool2d(2))):
        options: dict[str, Any] = {"backprop_threshold": threshold, "min_active": 0.0, "events": True}
        spikes = spiking_conv(
            x, first, pool=pool, params=NeuronParams(mem=0.9, threshold=20.0), **options
        ).spikes
        for other in (None, nn.MaxPool2d(1), nn.MaxPool2d(2, 1)):  # the input's gradient has ways of its own
            convolve(spikes, second, padding=1, pool=other).sum().backward(retain_graph=True)
        for between in (nn.MaxPool2d(2), nn.AvgPool2d(2)):
            convolve(pool_events(spikes, between), second, padding=1).sum().backward(retain_graph=True)


def _eprop() -> None:
    from ..learners import eprop

    with eprop.EProp(eprop.LSNNNetwork(NEURONS, NEURONS, NEURONS)) as learner:
        learner.run(torch.ones(STEPS, BATCH, NEURONS), lambda y, target: (y - target).square().sum(), 1.0)


def _ttfs() -> None:
    from ..layers.ttfs import to_ttfs

    net = to_ttfs(nn.Sequential(nn.Linear(NEURONS, NEURONS), nn.ReLU(), nn.Linear(NEURONS, 2)), window=16)
    net(torch.rand(BATCH, NEURONS)).sum().backward()


_OF_NO_LIBRARY = {
    "events and single steps": _events_and_steps,
    "convolutions": _convolutions,
    "e-prop": _eprop,
    "time-to-first-spike coding": _ttfs,
}
