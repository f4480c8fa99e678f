"""Parts in the order of their worth, the seconds each may take, and the jobs they are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from . import faces, networks
from .clock import Run
from .compare import Comparison, Row, memory, times
from .scan import scan
from .sizes import Sizes

Job = Callable[[Run], Iterator[Row]]

MINUTES = 8.0
COMPILE_SECONDS = 75.0
# together with the compilation less than MINUTES; what comes late is dropped first
PARTS = {
    "tests": 110.0,
    "network": 50.0,
    "s3gd": 45.0,
    "faces": 75.0,
    "scan": 20.0,
    "memory": 30.0,
    "compile": 40.0,
    "density": 20.0,
}
# torch.compile has no Triton kernels of this package, the tests' kernels are compiled by the tests' own processes
COMPILED_FIRST = ("network", "s3gd", "faces", "scan", "density")


def jobs(part: str, sizes: Sizes, device: str) -> dict[str, Job]:
    """The measurements of a part by name, those that matter most first; another process can go on at any."""
    if part == "network":
        return _timed(networks.training(sizes, device))
    if part == "s3gd":
        return _timed(networks.published(sizes, device))
    if part == "faces":
        return _timed(
            [
                faces.classifier(sizes, device),
                networks.unmodified_loop(sizes, device),
                faces.convolution(sizes, device),
                faces.recurrent(sizes, device),
                networks.one_call(sizes, device),
                faces.activation(sizes, device),
                faces.learner(sizes, device),
            ]
        )
    if part == "scan":
        return {f"N={n}": partial(scan, n=n) for n in sizes.scan_widths}
    if part == "memory":
        weighed = [
            networks.weighed(sizes, device),
            faces.convolution(sizes, device, figures=("peak", "kept")),
            faces.recurrent(sizes, device, figures=("peak", "kept")),
        ]
        return {each.row: partial(memory, comparison=each) for each in weighed}
    if part == "compile":
        return _timed(networks.compiled(sizes, device))
    if part == "density":
        return _timed(networks.density(sizes, device))
    raise ValueError(f"part {part!r} has no jobs")


def _timed(comparisons: Iterable[Comparison]) -> dict[str, Job]:
    return {each.row: partial(times, comparison=each) for each in comparisons}
