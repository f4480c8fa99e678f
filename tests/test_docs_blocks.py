"""Every ```python block of the README and of the documentation runs as written: page by page, in order.

A page is one namespace, empty at its start. A comment in the line before a block says that it cannot run here, and why,
``<!-- skip: needs the files of SHD -->``, or what the page needs from here on, ``<!-- needs: pytorch_lightning -->``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from frameworks import whole_torchvision  # noqa: F401

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>skip|needs):(?P<said>[^\n]*)-->\n\s*)?^(?P<indent> *)```python[^\n]*\n"
    r"(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[tuple[int, str, str, str]]:
    """For each block the line before its first, its code, and the comment: ``skip``, ``needs`` or nothing, and what."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code"))
        yield line, dedent(found["code"]), found["mark"] or "", (found["said"] or "").strip()


@pytest.mark.parametrize(
    "page", [p for p in pages() if any(blocks(p))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, code, mark, said in blocks(page):
        if mark == "needs":
            pytest.importorskip(said, reason=f"{said} is not installed")
        if mark != "skip":  # a traceback names the line of the page
            exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_the_report_that_is_read_line_by_line_is_what_its_block_prints(tmp_path: Path) -> None:
    """In a process of its own: where a loop is cut depends on the loops before."""
    page = ROOT / "docs" / "why.md"
    script = tmp_path / "why.py"
    script.write_text(next(blocks(page))[1])
    found = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SNN_SPARSE_QUIET": "1", "COLUMNS": "200"},
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == page.read_text().split("```text\n")[1].split("```")[0]


def test_a_skip_has_a_reason_and_no_fence_is_missed() -> None:
    for page in pages():
        text = page.read_text()
        assert text.count("```python") == len(list(blocks(page))), f"{page}: a block is not understood"
        assert all(said for _, _, mark, said in blocks(page) if mark), f"{page}: a comment that says nothing"


def test_links_of_the_readme_lead_somewhere() -> None:
    """Those of the site are checked by ``make docs``."""
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
