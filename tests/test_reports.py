"""Reports keep to the terminal's width: no word and no call is broken, and nothing is left out."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
import torch
from rich.console import Console
from torch import nn

from snn_sparse_plugin import SparsityReport, sparsify
from snn_sparse_plugin.core.lines import aligned, terminal_width, wrapped
from snn_sparse_plugin.interfaces.session import Session, sparse_session

snntorch = pytest.importorskip("snntorch")

WIDTHS = 60, 80, 120, 200


def words(text: str) -> list[str]:
    """The words of a report that lie outside its lines of dashes."""
    return sorted(word for word in text.split() if set(word) != {"-"})


def used() -> tuple[SparsityReport, Session]:
    """A network of which each neuron runs another way."""
    net = nn.Sequential(
        nn.Linear(6, 5),
        snntorch.Leaky(0.9, init_hidden=True),
        nn.Linear(5, 5),
        snntorch.Leaky(0.9, init_hidden=True, state_quant=lambda x: x),
        nn.Linear(5, 5),
        snntorch.Leaky(0.9, init_hidden=True, spike_grad=lambda x: (x > 0).float()),
        nn.Linear(5, 3),
        snntorch.Leaky(0.9, init_hidden=True, output=True),
    )
    report = sparsify(nn.ModuleDict({"encoder_with_a_long_name": net}))
    with sparse_session() as session:
        for now in torch.rand(4, 2, 6):
            net(now)[0].sum().item()  # asks for every step's number
    return report, session


def keeps_to(width: int, lines: Sequence[str], whole: Sequence[str]) -> None:
    assert max(map(len, lines)) <= width
    heads = {
        "why:",
        "ran:",
        "because:",
        "not",
        "fused",
        "why",
        "ran",
        "because",
    }  # once above, or at every row
    text, everything = "\n".join(lines), "\n".join(whole)
    assert [w for w in words(text) if w not in heads] == [w for w in words(everything) if w not in heads]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_report(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = used()
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = report._text(None)
    monkeypatch.setenv("COLUMNS", str(width))
    keeps_to(width, str(report).splitlines(), whole.splitlines())
    assert 'Surrogate("custom", function=f)' in str(report)
    assert "read it after the loop, or use unroll" in " ".join(str(report).split())


@pytest.mark.parametrize("width", WIDTHS)
def test_richs_console_shows_the_same(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = used()
    monkeypatch.setenv("COLUMNS", str(width))
    console = Console(width=width, file=io.StringIO())
    console.print(report)
    assert console.file.getvalue().rstrip() == str(report)  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_summary_of_a_session(width: int) -> None:
    _, session = used()
    keeps_to(width, session.lines(width), session.lines())


def test_what_does_not_fit_follows_below_its_row() -> None:
    rows = [("module", "mode", "why"), ("lif1", "fused", ""), ("lif2", "masked", "its spikes are graded")]
    assert aligned(rows)[3] == "lif2    masked  its spikes are graded"
    assert aligned(rows, 20) == [
        *("module  mode", "------  ------", "lif1    fused", "lif2    masked"),
        *("    why: its spikes", "    are graded"),
    ]


def test_a_call_is_one_word_and_a_wider_one_stays_whole() -> None:
    text = "write unroll(net, x, lengths=lengths) here"
    assert wrapped(text, 12) == ["write", "unroll(net, x, lengths=lengths)", "here"]
    assert wrapped(text, None, "- ") == [f"- {text}"]


def test_a_log_has_no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.__stdout__", io.StringIO())
    assert terminal_width() is None
    monkeypatch.setenv("COLUMNS", "72")
    assert terminal_width() == 72
