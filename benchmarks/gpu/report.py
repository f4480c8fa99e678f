"""The JSON that grows while parts run, and the table that is made of it, alone or against an earlier one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .compare import Row

# of a figure: where it is in a row, its unit, and by what a value is multiplied
FIGURES: dict[str, tuple[str, str, float]] = {
    "wall": ("wall_ms", "ms", 1),
    "host": ("host_ms", "ms", 1),
    "device": ("device_ms", "ms", 1),
    "graph": ("graph_ms", "ms", 1),
    "peak": ("peak_bytes", "MiB", 2**-20),
    "kept": ("kept_bytes_per_neuron_step", "B/neuron-step", 1),
    "share": ("share_of_copy", "of a copy", 1),
}
Key = tuple[str, str, str]


class Report:
    """Rows of a run. A row that names a row and a provider seen before adds to what is known of them."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = head | {"compiled": None, "tests": None, "graphs": None, "seconds": {}}
        self.data |= {"took": 0.0, "skipped": {}, "rows": {}}
        self.begin = time.monotonic()

    def add(self, part: str, rows: list[Row]) -> None:
        known = self.data["rows"].setdefault(part, [])
        for row in rows:
            key = row.get("row"), row.get("provider")
            same = [] if part == "tests" else [old for old in known if (old["row"], old["provider"]) == key]
            if same:
                same[0].update(row)
            else:
                known.append(row)
        self.write()

    def write(self) -> None:
        """Whole or not at all, so that a run that is killed leaves what it had."""
        self.data["took"] = round(time.monotonic() - self.begin, 1)
        self.data["tests"] = tests = tested(self.data["rows"].get("tests", []))
        measured = [row for part, rows in self.data["rows"].items() if part != "tests" for row in rows]
        for row in measured:
            row["tests"] = _verdict(row, tests)
        names = {id(row): f"{row['row']}: {row['provider']}" for row in measured}
        self.data["graphs"] = {
            "captured": [names[id(row)] for row in measured if "graph_ms" in row],
            "failed": {names[id(row)]: row["graph_error"] for row in measured if "graph_error" in row},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        made = self.path.with_suffix(".tmp")
        made.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(made, self.path)


def tested(rows: list[Row]) -> dict[str, Any]:
    """How the checks ended, by op."""
    ops: dict[str, dict[str, int]] = {}
    for row in rows:
        counts = ops.setdefault(row["op"], {"passed": 0, "failed": 0, "skipped": 0})
        counts[row["outcome"]] += 1
    ran = any(row["outcome"] == "passed" and not row["test"].startswith("doctor") for row in rows)
    failed = sum(counts["failed"] for counts in ops.values())
    return {"state": "failed" if failed else "ok" if ran else "no test ran", "ops": ops}


def _verdict(row: Row, tests: dict[str, Any]) -> str:
    """What the tests of a row's ops say of its figures."""
    wanted = [*row.get("ops", ["layer"]), *(["graph"] if "graph_ms" in row else [])]
    counts = {op: tests["ops"].get(op, {"passed": 0, "failed": 0}) for op in wanted}
    if failed := [f"{n['failed']} of {op} failed" for op, n in counts.items() if n["failed"]]:
        return "; ".join(failed)
    ran = tests["state"] != "no test ran" and all(n["passed"] for n in counts.values())
    return "ok" if ran else "not run"


def value(row: Row, figure: str) -> float | None:
    key, _, factor = FIGURES[figure]
    found = row.get(key)
    found = found["median"] if isinstance(found, dict) else found
    return None if found is None else found * factor


def lines(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every figure of this package's rows, with the best of the others.

    ``ratio`` says how many times less this package takes. A graph's rival is the fastest there is, in a graph or not.
    """
    for part, rows in report["rows"].items():
        for row in rows if part != "tests" else []:
            if row["role"] != "ours":
                continue
            head = {"row": row["row"], "provider": row["provider"]}
            if reason := row.get("failed") or row.get("skipped"):
                yield head | {"figure": "", "value": None, "note": reason}
                continue
            peers = [other for other in rows if other["row"] == row["row"] and other["role"] == "peer"]
            for figure in row.get("figures", []):
                note = "" if row["tests"] in ("ok", "not run") else row["tests"]
                found = value(row, figure)
                if found is None:
                    if error := row.get(f"{figure}_error"):
                        yield head | {"figure": figure, "value": None, "note": error}
                    continue
                kinds = ("graph", "wall") if figure == "graph" else (figure,)
                rivals = [
                    (v, p["provider"], k) for p in peers for k in kinds if (v := value(p, k)) is not None
                ]
                line = head | {"figure": figure, "value": found, "unit": FIGURES[figure][1], "note": note}
                if rivals:
                    best, name, kind = min(rivals)
                    peer = f"{name}, {kind}" if kind != figure else name
                    line |= {"peer": peer, "peer_value": best, "ratio": best / found if found else None}
                yield line


def earlier(path: Path) -> tuple[dict[str, Any], dict[Key, float]]:
    """An earlier report and its figures.

    Raises:
        ValueError: not a report of this script.
    """
    try:
        report = json.loads(path.read_text())
        found = {(e["row"], e["provider"], e["figure"]): e["value"] for e in lines(report)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no report of this script: {type(error).__name__}: {error}") from error
    return report, {key: number for key, number in found.items() if number is not None}


def compared(now: list[dict[str, Any]], before: dict[Key, float]) -> list[dict[str, Any]]:
    """The lines, with how many times better each figure is than it was."""
    found = []
    for line in now:
        old = before.get((line["row"], line["provider"], line["figure"]))
        if old and line["value"]:
            better = line["value"] / old if line["figure"] == "share" else old / line["value"]
            line = line | {"earlier": old, "earlier_ratio": better}
        found.append(line)
    return found


def show(
    report: dict[str, Any], now: list[dict[str, Any]], before: dict[str, Any] | None, console: Console
) -> None:
    """One table, and below it what is missing."""
    title = f"{report['device']}, commit {report['commit']}, {report['took']:.0f} s"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("row")
    table.add_column("provider", no_wrap=True)
    for column in ("figure", "value", "best peer", "ratio", *(["earlier", "ratio"] if before else [])):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("note", max_width=40)
    last = None
    for line in now:
        found, unit = line["value"], line.get("unit", "")
        peer = f"{line['peer']} {line['peer_value']:.4g}" if "peer" in line else ""
        cells = ["–" if found is None else f"{found:.4g} {unit}", peer, _times(line.get("ratio"))]
        if before:
            old = line.get("earlier")
            cells += ["" if old is None else f"{old:.4g}", _times(line.get("earlier_ratio"))]
        name = "" if line["row"] == last else line["row"]
        last = line["row"]
        table.add_row(name, line["provider"], line["figure"], *cells, line["note"])
    console.print(table, markup=False, highlight=False)
    for text in _missing(report, before):
        console.print(text, markup=False, highlight=False)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3g}×"


def _missing(report: dict[str, Any], before: dict[str, Any] | None) -> Iterator[str]:
    tests = report["tests"]
    counts = ", ".join(f"{op} {n['passed']}/{n['passed'] + n['failed']}" for op, n in tests["ops"].items())
    yield f"tests: {tests['state']}" + (f"; passed {counts}" if counts else "")
    yield from (
        f"failed: {row['test']}: {row['why'].strip().splitlines()[-1]}"
        for row in report["rows"].get("tests", [])
        if row["outcome"] == "failed"
    )
    reasons: dict[tuple[str, str], list[str]] = {}
    for part, rows in report["rows"].items():
        for row in rows if part != "tests" else []:
            reason = row.get("failed") or row.get("skipped")
            if reason and row["role"] != "ours":
                reasons.setdefault((row["provider"], reason), []).append(row["row"])
    yield from (f"{provider}, {len(of)} rows: {reason}" for (provider, reason), of in reasons.items())
    yield from (f"skipped {name}: {reason}" for name, reason in report["skipped"].items())
    if before and before["device"] != report["device"]:
        yield f"the earlier run was on another device: {before['device']}"
