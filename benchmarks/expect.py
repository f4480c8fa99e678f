"""What to expect: surrogate × activity × way × size, and the table of docs/expect.md that is made of it.

python benchmarks/expect.py            # measures, writes results/expect.json and the table; --table only the table
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "expect.json"
PAGE = ROOT / "docs" / "expect.md"
BEGIN, END = "<!-- table: python benchmarks/expect.py -->", "<!-- end of table -->"

SURROGATES = (("atan", 2.0), ("fast_sigmoid", 25.0), ("fast_sigmoid", 100.0))
SIZES = ((100, (50, 10), 50, 32), (700, (200, 200, 20), 100, 64), (1000, (1000, 1000, 20), 50, 64))
SPIKES = (0.03,), (0.01, 0.03, 0.1), (0.03,)
"""Of the input and of every layer, for each of the sizes."""
WAYS = {"snntorch": "snnTorch's loop", "sparse-loop": "loop in `sparse_mode()`", "sparse": "`unroll`"}


def measured(rounds: int, threads: int, small: bool, processor: bool) -> list[dict[str, Any]]:
    """A row for each case and way."""
    from rich.console import Console

    from snn_sparse_plugin.bench import BenchOptions, measure, run_network
    from snn_sparse_plugin.bench.problem import Config
    from snn_sparse_plugin.interfaces.doctor import diagnose

    if processor:
        measure.perf_counter = process_time  # type: ignore[attr-defined]
    options = BenchOptions(providers=tuple(WAYS), rounds=rounds, threads=threads, peak=False)
    sizes = ((10, (8, 4), 5, 2),) * 3 if small else SIZES
    cases = [(size, spikes) for size, each in zip(sizes, SPIKES, strict=True) for spikes in each]
    rows = []
    for (inputs, layers, steps, batch), spikes in cases:
        for surrogate, slope in SURROGATES:
            config = Config(
                inputs=inputs,
                layers=layers,
                batch=batch,
                density=spikes,
                rate=spikes,
                surrogate=surrogate,  # type: ignore[arg-type]
                slope=slope,
            )
            rows += run_network(options, Console(), (steps,), config)
    cpu = next(device["name"] for device in diagnose()["devices"] if device["device"] == "cpu")
    clock = "processor time" if processor else "wall time"
    return [{**row, "clock": clock, "processor": cpu} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, with the conditions under which they hold."""
    cases: dict[tuple[str, float, str], dict[str, float]] = {}
    for row in rows:
        shape = row["shape"]
        network = "–".join(map(str, (shape["inputs"], *shape["layers"])))
        case = f"{network}, T = {shape['T']}, B = {shape['B']}", row["density"], row["surrogate"]
        cases.setdefault(case, {})[row["provider"]] = row["step_ms"]["median"]
    lines = [
        "| network | spikes | surrogate | " + " | ".join(WAYS.values()) + " |",
        "|---|---|---|" + "---|" * len(WAYS),
    ]
    last = ("", 0.0)
    for (network, spikes, surrogate), ms in cases.items():
        first = (network, f"{100 * spikes:g} %") if (network, spikes) != last else ("", "")
        base = ms["snntorch"]
        ratios = [f"**{base / ms[way]:.1f}×**" for way in WAYS if way != "snntorch"]
        lines.append(f"| {' | '.join([*first, f'`{surrogate}`', f'{base:.1f} ms', *ratios])} |")
        last = network, spikes
    row = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    shared = ", shared with other work" if row["clock"] == "processor time" else ""
    lines += [
        "",
        f"{row['clock'].capitalize()}, {threads} of {row['processor']}{shared}, {row['dtype']}; {versions}.",
    ]
    return "\n".join(lines)


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with its table made anew."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="tiny sizes and no file, to see that it runs")
    parser.add_argument("--processor-time", action="store_true", help="for a busy machine, with --threads 1")
    parser.add_argument(
        "--table", action="store_true", help="only write the table of the rows that are there"
    )
    args = parser.parse_args()
    run = partial(measured, threads=args.threads, processor=args.processor_time)
    if args.small:
        print(table(run(2, small=True)))
    else:
        if not args.table:
            ROWS.write_text(json.dumps(run(args.rounds, small=False), indent=2) + "\n")
        PAGE.write_text(with_table(PAGE.read_text(), json.loads(ROWS.read_text())))
