"""Clocks: a step as Python sees it, as the device does, and replayed as a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import Literal, NamedTuple

import torch

from snn_sparse_plugin.bench.measure import Spread, Steps

from .sizes import Sizes

Phase = Literal["step", "backward"]
_WARM = 3  # a layer counts its density at call 1 and uses it later: both ways of a product are compiled then


class OutOfTime(Exception):
    """The rest of a part does not fit."""


class DeviceLost(Exception):
    """The device answers no more; only another process can go on."""


@dataclass
class Run:
    """What a part is given. ``warming``: kernels are compiled and nothing is measured."""

    sizes: Sizes
    device: str
    deadline: float
    warming: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def hurry(self) -> None:
        if monotonic() > self.deadline:
            raise OutOfTime

    def sync(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def still_there(self) -> None:
        """After a job or an error: memory is given back, and a device that is lost is noticed."""
        gc.collect()
        try:
            if self.on_gpu:
                # a capture that failed can leave an allocator or a generator that goes on capturing
                torch.randn(8, device=self.device).sum()
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(str(error)) from error


class Once(NamedTuple):
    """Seconds until Python returned, and until the device was done."""

    host: float
    wall: float


def once(run: Run, steps: Steps, phase: Phase = "step") -> Once:
    """One step, or its backward alone."""
    for parameter in steps.parameters:
        parameter.grad = None
    out = steps.forward() if phase == "backward" else None
    run.sync()
    begin = perf_counter()
    steps.backward(out if phase == "backward" else steps.forward())
    returned = perf_counter()
    run.sync()
    return Once(returned - begin, perf_counter() - begin)


def warm_up(run: Run, steps: Steps) -> float:
    """Seconds of the first step, which compiles kernels. A slow one is not run again."""
    first = once(run, steps).wall
    for _ in range(_WARM - 1):
        if run.warming or once(run, steps).wall > run.sizes.seconds / 3:
            break
    if run.warming:
        for _ in range(_WARM - 1):
            once(run, steps)
    return first


def alternate(
    run: Run, cases: dict[str, Steps], phase: Phase
) -> Iterator[tuple[str, list[Once] | Exception]]:
    """All in turn, each round starting with another one, as often as fits into the seconds of each.

    A quick one makes an untimed step first: a training loop repeats the same step, and none pays for what another
    has left in the caches. One that fails leaves the others in the race.
    """
    found: dict[str, list[Once]] = {name: [] for name in cases}
    rounds = dict.fromkeys(cases, 1)
    with _no_collector():
        for k in range(run.sizes.rounds):
            names = [name for name in found if k < rounds[name]]
            if not names:
                break
            first = k % len(names)
            for name in names[first:] + names[:first]:
                try:
                    if found[name] and found[name][-1].wall < 0.05:
                        once(run, cases[name], phase)
                    found[name].append(once(run, cases[name], phase))
                except Exception as error:
                    del found[name]
                    yield name, error
                    continue
                fits = int(run.sizes.seconds / max(found[name][0].wall, 1e-6))
                rounds[name] = min(run.sizes.rounds, max(3, fits))
    yield from found.items()


@contextmanager
def _no_collector() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def device_ms(run: Run, steps: Steps, phase: Phase) -> float:
    """Milliseconds of kernels, copies and fills on the device, without the gaps between them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    repeats, total = (1, 0.0) if once(run, steps, phase).wall > 0.1 else (5, 0.0)
    for _ in range(repeats):
        for parameter in steps.parameters:
            parameter.grad = None
        out = steps.forward() if phase == "backward" else None
        run.sync()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            steps.backward(out if phase == "backward" else steps.forward())
            run.sync()
        total += sum(
            event.time_range.elapsed_us()
            for event in profiler.events()
            # an annotation spans the kernels inside it
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        )
    if not total:
        raise RuntimeError("the profiler saw nothing on the device")
    return total / repeats / 1e3


def graph_ms(run: Run, steps: Steps) -> Spread:
    """Milliseconds of a replay of a captured step."""

    def step() -> None:
        for parameter in steps.parameters:
            parameter.grad = None  # a gradient that is made in the capture belongs to the graph
        steps.backward(steps.forward())

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
        return queued(run, graph.replay)
    finally:
        for parameter in steps.parameters:
            parameter.grad = None
        graph.reset()


def queued(run: Run, work: Callable[[], None], repeats: int = 10) -> Spread:
    """Milliseconds of one call: several are queued between two looks at the clock, which hides their launches."""
    for _ in range(3):
        work()
    seconds = []
    for _ in range(run.sizes.rounds):
        run.sync()
        begin = perf_counter()
        for _ in range(repeats):
            work()
        run.sync()
        seconds.append((perf_counter() - begin) / repeats)
        if sum(seconds) * repeats > run.sizes.seconds and len(seconds) >= 3:
            break
    return Spread.of(seconds)
