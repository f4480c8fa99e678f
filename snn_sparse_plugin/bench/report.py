"""The rows of a run as tables for people."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console

from ..core.tables import show_table
from .layers import written


def show_rows(rows: list[dict[str, Any]], console: Console, *, baseline: str, phase: str = "step") -> None:
    """One table of providers, with how many times faster than the baseline each is."""
    timed = [row for row in rows if row["skipped"] is None]
    if timed:
        _show_timed(timed, console, baseline, phase)
    _show_skipped(rows, console)


def _show_timed(rows: list[dict[str, Any]], console: Console, baseline: str, phase: str) -> None:
    first = rows[0]
    shape = first["shape"]
    size = written(shape["inputs"], shape["layers"])
    rates = ", ".join(f"{100 * r:.1f}" for r in first["layer_rates"])
    wide = console.width >= 100
    base = next((row[f"{phase}_ms"]["median"] for row in rows if row["provider"] == baseline), math.nan)
    lines = []
    for row in rows:
        ratio = base / row[f"{phase}_ms"]["median"]
        whole = row["step_ms"]
        per = row["saved_bytes_per_neuron_step"]
        spread = f" ({human_ms(whole['p20'])}–{human_ms(whole['p80'])})" if wide else ""
        lines.append(
            (
                row["provider"],
                human_ms(row["forward_ms"]["median"]),
                human_ms(row["backward_ms"]["median"]),
                human_ms(whole["median"]) + spread,
                "" if math.isnan(ratio) else f"{ratio:.1f}×",
                human_bytes(row["saved_bytes"]),
                "–" if per is None else f"{per:.2f}",
                human_bytes(row["peak_bytes"]),
            )
        )
    show_table(
        console,
        ("provider", "forward", "backward", "step", "ratio", "saved", "B/n-s", "peak"),
        lines,
        title=f"{first['op']} {size}, T={shape['T']}, B={shape['B']}, input {100 * first['density']:.3g} %, "
        f"layers {rates} %, {first['threads']} threads, {first['device']}",
        caption=f"ms: median{' (20th to 80th percentile)' if wide else ''}. ratio: {phase} of {baseline} / {phase}. "
        "saved: bytes kept for backward, and per neuron-step.",
    )


def show_surrogates(rows: list[dict[str, Any]], console: Console) -> None:
    """A line for each surrogate, length and provider: how many times faster than snnTorch's loop, and peak memory."""
    timed = [row for row in rows if row["skipped"] is None]
    base = {_case(row): row["step_ms"]["median"] for row in timed if row["provider"] == "snntorch"}
    lines = []
    for row in timed:
        median = row["step_ms"]["median"]
        ratio = f"{base[_case(row)] / median:.1f}×" if _case(row) in base else ""
        first = row["surrogate"] if row["provider"] == timed[0]["provider"] else ""
        peak = human_bytes(row["peak_bytes"])
        lines.append((first, row["provider"], str(row["shape"]["T"]), human_ms(median), ratio, peak))
    if timed:
        show_table(
            console,
            ("surrogate", "provider", "T", "step", "ratio", "peak"),
            lines,
            title="a training step with the surrogates that people use",
            caption="ms: median. ratio: step of snntorch / step. peak: of a process.",
            keys=2,
        )
    _show_skipped(rows, console)


def _case(row: dict[str, Any]) -> tuple[str, int]:
    return row["surrogate"], row["shape"]["T"]


def _show_skipped(rows: list[dict[str, Any]], console: Console) -> None:
    skipped: dict[str, dict[str, None]] = {}  # one library that is missing is several providers
    for row in rows:
        if row["skipped"] is not None:
            skipped.setdefault(row["skipped"], {})[row["provider"]] = None
    for reason, providers in skipped.items():
        console.print(f"[yellow]skipped[/] {', '.join(providers)}: {reason}", highlight=False, soft_wrap=True)


def human_ms(value: float) -> str:
    """Milliseconds with four figures: ``1.23``, ``123.4``, ``1234``."""
    return f"{value:.{2 if value < 99.995 else 1 if value < 999.95 else 0}f}"


def human_bytes(count: int | None) -> str:
    """``1536`` as ``1.5 KiB``."""
    if count is None:
        return "–"
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def show_crossover(rows: list[dict[str, Any]], sweep: str, console: Console) -> None:
    """Step times over the sweep, the fastest marked, and where the dense product overtakes the events."""
    timed = [row for row in rows if row["skipped"] is None]
    names = list(dict.fromkeys(row["provider"] for row in timed))
    points: dict[float, dict[str, float]] = {}
    for row in timed:
        points.setdefault(_point(row, sweep), {})[row["provider"]] = row["step_ms"]["median"]
    lines = []
    for point, times in points.items():
        best = min(times.values())
        cells = [f"[bold]{human_ms(t)}[/]" if t == best else human_ms(t) for t in (times[n] for n in names)]
        if "auto" in names:
            others = [t for name, t in times.items() if name != "auto"]
            cells.append(f"{times['auto'] / min(others):.2f}" if others else "–")
        lines.append((_label(point, sweep), *cells))
    show_table(
        console,
        ("density" if sweep == "density" else "N", *names, *(["auto / best"] if "auto" in names else [])),
        lines,
        title=f"step in ms over {'input density' if sweep == 'density' else 'layer size N'}; the fastest is bold",
    )
    if {"events", "dense"} <= set(names):
        console.print(crossover({p: (t["events"], t["dense"]) for p, t in points.items()}, sweep))
    _show_skipped(rows, console)


def _point(row: dict[str, Any], sweep: str) -> float:
    return row["density"] if sweep == "density" else row["shape"]["layers"][0]


def _label(point: float, sweep: str) -> str:
    return f"{100 * point:g} %" if sweep == "density" else f"{point:g}"


def crossover(times: dict[float, tuple[float, float]], sweep: str) -> str:
    """A sentence on where the dense product becomes faster than the events, interpolated between two points.

    Args:
        times: by point, the time over events and the time of the dense product.

    Example:
        >>> crossover({0.01: (1.0, 2.0), 0.04: (4.0, 2.0)}, "density")
        'The dense product wins from about 2 % on.'
    """
    points = sorted(times)
    gain = [math.log(times[p][0] / times[p][1]) for p in points]  # > 0: dense wins
    if all(g <= 0 for g in gain):
        return f"Events win at every point up to {_label(points[-1], sweep)}."
    if all(g > 0 for g in gain):
        return f"The dense product wins at every point from {_label(points[0], sweep)} on."
    last = max(k for k, g in enumerate(gain) if g <= 0)
    if last == len(points) - 1:
        wins = ", ".join(_label(p, sweep) for p, g in zip(points, gain, strict=True) if g > 0)
        return f"The dense product wins at {wins} only."
    share = -gain[last] / (gain[last + 1] - gain[last])
    at = math.exp(math.log(points[last]) * (1 - share) + math.log(points[last + 1]) * share)
    shown = f"{100 * at:.2g} %" if sweep == "density" else f"N = {at:.0f}"
    return f"The dense product wins from about {shown} on."
