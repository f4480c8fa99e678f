"""Every ```python block of the README and of the documentation runs as written: page by page, in order.

A page is one namespace, empty at its start. A block that cannot run here is marked in the line before it, with the
reason: ``<!-- skip: needs the files of SHD -->``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"(?:<!-- skip:(?P<reason>[^\n]*)-->\n\s*)?^(?P<indent> *)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S
)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[tuple[int, str, str | None]]:
    """The line before the first of each block's, its code, and why it is skipped."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        reason = found["reason"]
        yield text.count("\n", 0, found.start("code")), dedent(found["code"]), reason and reason.strip()


@pytest.mark.parametrize("page", [p for p in pages() if any(blocks(p))], ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, code, reason in blocks(page):
        if reason is None:  # a traceback names the line of the page
            exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_a_skip_has_a_reason_and_no_fence_is_missed() -> None:
    for page in pages():
        text = page.read_text()
        assert text.count("```python") == len(list(blocks(page))), f"{page}: a block is not understood"
        assert all(reason != "" for _, _, reason in blocks(page)), f"{page}: a skip without a reason"
