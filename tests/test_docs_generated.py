"""What the documentation's build makes: the options of every command, and pages of the notebooks."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MADE = runpy.run_path(str(ROOT / "docs" / "generated.py"))
COMMANDS = [found for found in map(str, MADE["options"]()) if found.startswith("\n### ")]


def test_every_command_has_its_options() -> None:
    page = MADE["on_page_markdown"]((ROOT / "docs" / "reference" / "cli.md").read_text())
    for name in ("run", "bench", "warm", "experiment s3gd", "experiment s3gd-conv", "ttfs verify"):
        assert f"### `snn-sparse {name}`" in page
    for option in ("--network", "--protocol", "--sweep", "--all", "--quick", "--backprop-threshold"):
        assert f"| `{option}" in page


def test_the_table_names_every_command() -> None:
    by_hand = (ROOT / "docs" / "reference" / "cli.md").read_text().partition("## Options")[0]
    names = re.findall(r"### `snn-sparse (.+?)`", "".join(COMMANDS))
    assert len(names) > 10
    for name in names:
        group, _, command = name.partition(" ")
        assert f"`{group}" in by_hand
        assert command in by_hand


@pytest.mark.parametrize("path", sorted(MADE["NOTEBOOKS"].glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_a_page_of_the_site(path: Path) -> None:
    page, pictures = MADE["notebook"](path)
    assert page.startswith("# ")
    assert f"notebooks/{path.stem}.md" in (ROOT / "mkdocs.yml").read_text()
    assert pictures
    for name, content in pictures.items():
        assert content.startswith(b"\x89PNG")
        assert f"]({name})" in page
