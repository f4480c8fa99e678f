"""Tables of a terminal or a log in which no width breaks a cell."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from rich.console import Console
from rich.table import Table
from rich.text import Text

_GAP = 2  # between two columns of a table without a box


def show_table(
    console: Console,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    caption: str = "",
    keys: int = 1,
) -> None:
    """Print a table; columns that do not fit the console's width follow below, behind the same first ones.

    Args:
        headers: of the columns.
        rows: cells in rich's markup, as many as headers.
        title, caption: lines above and below, broken between words alone.
        keys: columns that say what a row is: on the left, and repeated.

    Example:
        >>> show_table(Console(width=20), ("layer", "spikes", "active"), [("lif1", "3.0 %", "8.5 %")])
        layer  spikes
        lif1    3.0 %
        layer  active
        lif1    8.5 %
    """
    if title:
        show_words(console, title)
    for columns in _pieces(_widths(headers, rows), keys, console.width):
        table = Table(box=None, pad_edge=False)
        for k in columns:
            table.add_column(headers[k], justify="left" if k < keys else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[k] for k in columns))
        console.print(table)
    if caption:
        show_words(console, caption)


def show_words(console: Console, line: str) -> None:
    """A plain line, broken between words: a word that is wider than the console stays whole."""
    text = fill(line, console.width, break_long_words=False, break_on_hyphens=False)
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _widths(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [
        max(Text.from_markup(cell).cell_len for cell in column) for column in zip(headers, *rows, strict=True)
    ]


def _pieces(widths: Sequence[int], keys: int, room: int) -> list[list[int]]:
    """Which columns each table has: the keys, and of the others as many as fit, one at least."""
    first = list(range(keys))
    start = sum(widths[:keys]) + _GAP * (keys - 1)
    pieces: list[list[int]] = []
    used = room + 1
    for k in range(keys, len(widths)):
        if used + _GAP + widths[k] > room:
            pieces.append([*first])
            used = start
        pieces[-1].append(k)
        used += _GAP + widths[k]
    return pieces or [first]
