"""A row of the report: the same computation by this package and by others, timed and weighed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from snn_sparse_plugin.bench.measure import Spread, Steps, device_peak_bytes, saved_bytes
from snn_sparse_plugin.core.errors import MissingDependencyError

from .clock import Phase, Run, alternate, device_ms, graph_ms, once, warm_up

Row = dict[str, Any]
NEEDS_GPU = "needs a GPU"


@dataclass(frozen=True)
class Comparison:
    """What is computed, and by whom.

    Args:
        row: its name, the same in every run, so that runs can be compared.
        shape: what is needed to read a figure on its own.
        ours, peers, also: by provider, what makes its steps. ``also`` is measured and no rival.
        figures: those that the summary shows; all are in the JSON.
        ops: whose tests have to pass.
        phase: what is timed.
        device, graph: the providers whose time on the device, and in a CUDA graph, is measured.
        per: how many steps a time is divided by.
        neuron_steps: what bytes kept for backward are divided by.
    """

    row: str
    shape: Mapping[str, Any]
    ours: Mapping[str, Callable[[], Steps]]
    peers: Mapping[str, Callable[[], Steps]] = field(default_factory=dict)
    also: Mapping[str, Callable[[], Steps]] = field(default_factory=dict)
    figures: tuple[str, ...] = ("wall",)
    ops: tuple[str, ...] = ("layer",)
    phase: Phase = "step"
    device: tuple[str, ...] = ()
    graph: tuple[str, ...] = ()
    per: int = 1
    neuron_steps: int | None = None

    def providers(self, warming: bool) -> dict[str, Callable[[], Steps]]:
        """Those with Triton kernels come first, and are the only ones to be compiled before."""
        found = {**self.ours, **self.peers, **self.also}
        if warming:
            return {name: make for name, make in found.items() if name in self.ours or name == "spikingjelly"}
        return found

    def head(self, provider: str) -> Row:
        role = "ours" if provider in self.ours else "peer" if provider in self.peers else "also"
        return {
            "row": self.row,
            "provider": provider,
            "role": role,
            "shape": dict(self.shape),
            "figures": list(self.figures),
            "ops": list(self.ops),
            "phase": self.phase,
            "per": self.per,
        }


def why(error: Exception) -> dict[str, str]:
    """An error as what a row says of it: a library that is not there is no failure."""
    if isinstance(error, MissingDependencyError):
        return {"skipped": str(error)[:500]}
    return {"failed": f"{type(error).__name__}: {error}"[:500]}


def _built(run: Run, comparison: Comparison, cases: dict[str, Steps]) -> Iterator[Row]:
    """Fills ``cases``; the rows are of providers that do not run."""
    for provider, make in comparison.providers(run.warming).items():
        run.hurry()
        try:
            begin = perf_counter()
            steps = make()
            warm_up(run, steps)
            cases[provider] = steps
            yield comparison.head(provider) | {"first_seconds": round(perf_counter() - begin, 2)}
        except Exception as error:  # another library fails in its own way
            yield comparison.head(provider) | why(error)
            run.still_there()


def times(run: Run, comparison: Comparison) -> Iterator[Row]:
    """Rows with ``wall_ms`` and ``host_ms``, then the same rows' ``device_ms``, then their ``graph_ms``.

    A later row of a provider adds to its first. Graphs come last: a capture that fails can leave a process in which
    nothing runs any more.
    """
    cases: dict[str, Steps] = {}
    yield from _built(run, comparison, cases)
    if run.warming:
        return
    lost = []
    for provider, found in alternate(run, cases, comparison.phase):
        head = comparison.head(provider)
        if isinstance(found, Exception):
            lost.append(provider)
            yield head | why(found)
        else:
            yield head | {
                "wall_ms": _spread([each.wall for each in found], comparison.per),
                "host_ms": _spread([each.host for each in found], comparison.per),
                "rounds": len(found),
            }
    if lost:
        run.still_there()
    for figure, providers, measure in (
        ("device", comparison.device, lambda steps: device_ms(run, steps, comparison.phase) / comparison.per),
        ("graph", comparison.graph, lambda steps: graph_ms(run, steps)._asdict()),
    ):
        for provider in providers:
            if provider not in cases or provider in lost:
                continue
            run.hurry()
            head = comparison.head(provider)
            if not run.on_gpu:
                yield head | {f"{figure}_error": NEEDS_GPU}
                continue
            try:
                yield head | {f"{figure}_ms": measure(cases[provider])}
            except Exception as error:
                yield head | {f"{figure}_error": f"{type(error).__name__}: {error}"[:500]}
                run.still_there()


def _spread(seconds: list[float], per: int) -> dict[str, float]:
    return {name: round(value, 5) for name, value in Spread.of([s / per for s in seconds])._asdict().items()}


def memory(run: Run, comparison: Comparison) -> Iterator[Row]:
    """Rows with ``peak_bytes`` and ``kept_bytes``, one provider after the other, each alone on the device."""
    for provider, make in comparison.providers(run.warming).items():
        run.hurry()
        head = comparison.head(provider)
        try:
            steps = make()
            once(run, steps)
            kept, out = saved_bytes(steps.forward, steps.kept)
            steps.backward(out)
            del out
            for parameter in steps.parameters:
                parameter.grad = None
            found: Row = {"kept_bytes": kept}
            if comparison.neuron_steps:
                found["kept_bytes_per_neuron_step"] = round(kept / comparison.neuron_steps, 4)
            peak = {"peak_bytes": device_peak_bytes(steps)} if run.on_gpu else {"peak_error": NEEDS_GPU}
            yield head | found | peak
            del steps
        except Exception as error:
            yield head | why(error)
        run.still_there()
