"""A script, module or notebook cell in sparse mode, and what to say at the end."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ..core import tally
from ..core.errors import ConfigError
from ..core.legend import legend
from ..core.lines import aligned, wrapped
from ..core.tally import ClassRuns
from ..fusion import meter, record
from ..mode import sparse_mode

__all__ = ["Session", "class_table", "run_script", "script_error", "sparse_session", "threshold_of"]


class Session:
    """What ran inside :func:`sparse_session`."""

    def __init__(self) -> None:
        self.meter = meter.Meter()
        self.classes: dict[str, ClassRuns] = {}
        self.reasons: dict[str, int] = {}

    def lines(self, width: int | None = None) -> list[str]:
        """The summary: neuron classes, what was fused and saved, and why recorded steps had to run."""
        found: list[str] = []
        total = self.meter
        if total.calls:
            found.append(
                f"time fusion: {total.steps} neuron calls of step loops ran as {total.calls} fused calls, which kept "
                f"{_bytes(total.bytes)} for backward; upstream about {_bytes(total.bytes_upstream)}"
            )
            if total.timed:
                found.append(
                    f"forward of the neurons and their linear layers in {total.timed} of these calls: "
                    f"{_seconds(total.seconds)}; upstream about {_seconds(total.seconds_upstream)}"
                )
            found.append("(upstream: one step of each, measured, times the number of steps)")
        elif self.classes:
            found.append("time fusion: no step loop was fused")
        ways = {way for runs in self.classes.values() for way in runs.calls}
        found += [f"{word}: {meaning}" for word, meaning in legend((), ways)]
        if self.reasons:
            often = sorted(self.reasons.items(), key=lambda item: -item[1])[:5]
            found.append("recorded steps ran for: " + ", ".join(f"{name} ({n})" for name, n in often))
        told = (piece for line in found for piece in wrapped(line, width, rest="  "))
        return [*class_table(self.classes, width), *told]


@contextmanager
def sparse_session(**options: Any) -> Iterator[Session]:
    """:func:`~snn_sparse_plugin.sparse_mode` that also keeps account, which costs a little time.

    Args:
        **options: of :class:`~snn_sparse_plugin.SparseConfig`.

    Yields:
        Session: filled when the block ends, by an exception too.
    """
    found = Session()
    reasons, outer = dict(record.reasons), meter.current
    try:
        with tally.account() as account:
            found.classes = account.classes
            meter.current = found.meter
            with sparse_mode(**options):
                yield found
    finally:
        meter.current = outer
        found.reasons = {
            name: n - reasons.get(name, 0)
            for name, n in record.reasons.items()
            if n > reasons.get(name, 0) and name != "a report"
        }


def run_script(target: str, args: Sequence[str], *, module: bool = False) -> None:
    """Run a script, or with ``module`` what ``python -m`` would, as if started by ``python``."""
    argv, path = sys.argv, list(sys.path)
    try:
        if module:
            sys.argv, sys.path[0] = [target, *args], ""
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = [target, *args], str(Path(target).resolve().parent)
            runpy.run_path(target, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path


def script_error(error: BaseException) -> bool:
    """Whether a script under :func:`run_script` raised it; its traceback is then cut to the script's own frames."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code is not run_script.__code__:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    traceback = traceback.tb_next
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__") == "runpy":
        traceback = traceback.tb_next
    error.__traceback__ = traceback
    return True


def threshold_of(text: str) -> float | Literal["auto"] | None:
    """``backprop_threshold`` as it is written in a command: ``auto``, ``exact`` or ``None``, or a distance.

    Example:
        >>> threshold_of("0.2"), threshold_of("exact")
        (0.2, None)
    """
    if text == "auto":
        return "auto"
    if text in ("exact", "None"):
        return None
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"--backprop-threshold takes auto, exact or a number, got {text!r}.") from error


def class_table(runs: dict[str, ClassRuns], width: int | None = None) -> list[str]:
    """A row a class, ``calls in modules`` for each way of running that occurred, and a last line of totals."""
    if not runs:
        return ["no spiking neuron of a supported library ran"]
    ways = [way for way in tally.WAYS if any(way in of_class.calls for of_class in runs.values())]
    rows = [("neuron", *(way.replace("_", " ") for way in ways), "not fused because")]
    for kind, of_class in sorted(runs.items()):
        cells = (_cell(of_class, way) for way in ways)
        why = (f"{reason} ({n})" for reason, n in of_class.reasons.items())
        rows.append((kind, *cells, ", ".join(why)))
    fused = sum(of_class.modules.get("fused", 0) for of_class in runs.values())
    stepped = sum(sum(of_class.reasons.values()) for of_class in runs.values())
    backward = sum(of_class.calls.get("backward", 0) for of_class in runs.values())
    total = f"modules: {fused} ran fused, {stepped} step by step; {backward} sparse backward calls"
    return [*aligned(rows, width), *wrapped(total, width, rest="  ")]


def _cell(runs: ClassRuns, way: str) -> str:
    calls, modules = runs.calls.get(way, 0), runs.modules.get(way, 0)
    return f"{calls} in {modules}" if modules else str(calls or "")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"
