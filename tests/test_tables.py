"""Tables at every width: nothing is cut, and what does not fit follows below."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from snn_sparse_plugin.bench.report import human_ms, show_rows
from snn_sparse_plugin.core.tables import show_table, show_words

HEADERS = ("provider", "forward", "backward", "ratio")
ROWS = [("sparse-events", "[bold]1.25[/]", "12345", "30.1×"), ("snntorch", "37.6", "2.5", "1.0×")]


def shown(width: int, show) -> str:  # type: ignore[no-untyped-def]
    console = Console(width=width, file=io.StringIO())
    show(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [30, 40, 60, 200])
def test_every_cell_is_whole_and_there(width: int) -> None:
    text = shown(
        width, lambda console: show_table(console, HEADERS, ROWS, title="a title", caption="ms: median")
    )
    for word in (
        "provider",
        "sparse-events",
        "1.25",
        "12345",
        "30.1×",
        "snntorch",
        "37.6",
        "ratio",
        "a title",
    ):
        assert word in text
    assert "…" not in text
    tables = text.count("provider")
    assert tables == {30: 2, 40: 1, 60: 1, 200: 1}[width]
    assert max(map(len, text.splitlines())) <= width


def test_a_word_wider_than_the_console_is_whole() -> None:
    text = shown(20, lambda console: show_words(console, "network 3×32×32-64C3p1-64C3p1-MP2-10, T=10 [x]"))
    assert text.splitlines() == ["network", "3×32×32-64C3p1-64C3p1-MP2-10,", "T=10 [x]"]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_benchmark_is_whole(width: int) -> None:
    spread = {"median": 12345.678, "p20": 12300.0, "p80": 12400.0}
    row = {
        "op": "network",
        "provider": "sparse-events",
        "skipped": None,
        "shape": {"T": 100, "B": 64, "inputs": (3, 32, 32), "layers": ("256C3p1-MP2",) * 6},
        "layer_rates": [0.03] * 6,
        "density": 0.02,
        "threads": 2,
        "device": "cpu",
        **{f"{phase}_ms": spread for phase in ("forward", "backward", "step")},
        "saved_bytes": 1_000_000,
        "saved_bytes_per_neuron_step": 12.34,
        "peak_bytes": 3_000_000_000,
    }
    text = shown(width, lambda console: show_rows([row], console, baseline="sparse-events"))
    for word in ("sparse-events", "12346", "976.6 KiB", "12.34", "2.79 GiB", "backward", "1.0×"):
        assert word in text
    assert "…" not in text


def test_times_have_four_figures() -> None:
    assert [human_ms(value) for value in (0.123, 1.234, 99.996, 123.44, 999.96, 12345.6)] == [
        *("0.12", "1.23", "100.0", "123.4", "1000", "12346")
    ]
