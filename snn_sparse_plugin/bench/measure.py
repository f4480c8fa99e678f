"""Time in alternating rounds, bytes saved for backward, and peak memory in a process of its own."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .problem import Config


@dataclass(frozen=True)
class Steps:
    """What is timed: ``backward(forward())``. ``kept``: inputs and parameters, which are no memory of the backward."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]
    parameters: list[Tensor]
    kept: list[Tensor]


class Spread(NamedTuple):
    """Median and the 20th and 80th percentile, in milliseconds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        p20, median, p80 = np.percentile(np.array(seconds) * 1e3, [20, 50, 80])
        return cls(float(median), float(p20), float(p80))


class Timing(NamedTuple):
    """Forward with the loss, backward, and both with ``zero_grad`` before: the step without the optimizer."""

    forward: Spread
    backward: Spread
    step: Spread


class Measured(NamedTuple):
    """What one provider did on one config; ``skipped`` is the reason it did not run."""

    timing: Timing | None = None
    saved: int | None = None
    peak: int | None = None
    skipped: str | None = None


def run_step(steps: Steps, clock: Callable[[], float] = perf_counter) -> tuple[float, float, float]:
    """One step: seconds of forward, backward and the whole."""
    start = clock()
    for parameter in steps.parameters:
        parameter.grad = None
    begin = clock()
    out = steps.forward()
    middle = clock()
    steps.backward(out)
    end = clock()
    return middle - begin, end - middle, end - start


def time_alternating(
    cases: dict[str, Steps], rounds: int, device: str, advance: Callable[[], None] = lambda: None
) -> dict[str, Timing]:
    """All cases in turn, ``rounds`` times over, each round starting with another; two warm-up steps each.

    In its turn a case makes one step that is not timed and one that is: a training loop repeats the same step, and
    so none pays for the caches that another has filled or for freeing the graph that another has left.
    """

    def clock() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return perf_counter()

    for steps in cases.values():
        for _ in range(2):
            run_step(steps)
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in cases}
    names = list(cases)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for k in range(rounds):
            first = k % len(names)
            for name in names[first:] + names[:first]:
                run_step(cases[name], clock)
                seconds[name].append(run_step(cases[name], clock))
            advance()
    finally:
        if collecting:
            gc.enable()
    return {
        name: Timing(*(Spread.of(list(phase)) for phase in zip(*runs, strict=True)))
        for name, runs in seconds.items()
    }


def saved_bytes(forward: Callable[[], Any], kept: Iterable[Tensor] = ()) -> tuple[int, Any]:
    """Bytes autograd keeps for the backward of ``forward()``, and what it returned.

    Every storage counts once, as a whole. Storages of ``kept``, tensors that live anyway, do not count.
    """
    known = {t.untyped_storage().data_ptr() for t in kept}
    storages: dict[int, Any] = {}  # holds them, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    return sum(storage.nbytes() for storage in storages.values()), out


def device_peak_bytes(steps: Steps) -> int:
    """Memory of the CUDA device two steps need beyond what is there before the first, from torch's allocator."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_step(steps)
    run_step(steps)
    return torch.cuda.max_memory_allocated() - before


def peak_bytes(config: Config, provider: str, threads: int) -> int | None:
    """Memory two steps need beyond what is there before the first, measured in a fresh process.

    From Linux's high-water mark of resident memory; on other systems None.
    """
    request = json.dumps({"config": asdict(config), "provider": provider, "threads": threads})
    child = subprocess.run(
        [sys.executable, "-m", "snn_sparse_plugin.bench.peak"],
        input=request,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return json.loads(child.stdout.splitlines()[-1])["peak"] if child.returncode == 0 else None
    except (IndexError, ValueError, KeyError):
        return None
