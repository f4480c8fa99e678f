"""Lines of text that keep to a width and break no word and no call."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from textwrap import wrap

_GAP = 2  # between two columns
_CALL = re.compile(r"[\w.=]+\([^()]*\)")
_KEPT = "\N{NO-BREAK SPACE}"


def terminal_width() -> int | None:
    """Columns of the terminal, or of ``COLUMNS``; None in a log or a notebook, where lines may have any length."""
    return shutil.get_terminal_size((0, 0)).columns or None


def wrapped(text: str, width: int | None, first: str = "", rest: str = "") -> list[str]:
    """The text in lines of at most ``width``; a word, or a call with its arguments, that is wider stays whole.

    Args:
        first, rest: what stands before the first line and before the others.

    Example:
        >>> wrapped("run the network with unroll(net, x)", 24, "1  ", "   ")
        ['1  run the network with', '   unroll(net, x)']
    """
    if width is None:
        return [first + text]
    whole = _CALL.sub(lambda call: call.group().replace(" ", _KEPT), text)
    broken = wrap(
        whole,
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_KEPT, " ") for line in broken]


def beside(notes: Sequence[tuple[str, str]], width: int | None = None) -> list[str]:
    """``(word, meaning)`` side by side; the meanings below where the words leave too little room."""
    indent = max(len(word) for word, _ in notes) + 2 * _GAP
    lines = []
    for word, meaning in notes:
        first = f"{' ' * _GAP}{word}".ljust(indent)
        if width is None or indent <= width // 3:
            lines += wrapped(meaning, width, first, " " * indent)
        else:
            lines += [first.rstrip(), *wrapped(meaning, width, " " * 2 * _GAP, " " * 2 * _GAP)]
    return lines


def aligned(rows: Sequence[tuple[str, ...]], width: int | None = None) -> list[str]:
    """The lines of a table of text; the first row is its head.

    Columns that do not fit follow below their row, with the head's word before each.

    Example:
        >>> table = [("module", "mode", "why"), ("lif1", "masked", "graded spikes: they are not events")]
        >>> print("\\n".join(aligned(table, 30)))
        module  mode
        ------  ------
        lif1    masked
            why: graded spikes: they
            are not events
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    fit = len(widths)
    while width is not None and fit > 1 and sum(widths[:fit]) + _GAP * (fit - 1) > width:
        fit -= 1
    gap = " " * _GAP
    head, *below = (
        gap.join(cell.ljust(size) for cell, size in zip(row[:fit], widths, strict=False)).rstrip()
        for row in rows
    )
    lines = [head, gap.join("-" * size for size in widths[:fit])]
    for row, line in zip(rows[1:], below, strict=True):
        lines.append(line)
        for word, cell in zip(rows[0][fit:], row[fit:], strict=True):
            lines += wrapped(f"{word}: {cell}", width, " " * 4, " " * 4) if cell else []
    return lines
