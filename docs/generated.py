"""Pages that are made when the site is built: the options of every command, and the notebooks with their outputs."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer.main

from snn_sparse_plugin.interfaces.cli import app

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The mark ``<!-- options of every command -->`` becomes those options."""
    return markdown.replace("<!-- options of every command -->", "\n".join(options()))


def options(command: Any = None, context: Any = None, path: str = "snn-sparse") -> Iterator[str]:
    """A section for each command: its help, and a table of its options."""
    command = command or typer.main.get_command(app)
    context = command.make_context(path, [], parent=context, resilient_parsing=True)
    below = getattr(command, "commands", {})
    if not below:
        records = [p.get_help_record(context) for p in command.get_params(context)]
        yield f"\n### `{path}`\n\n{_paragraphs(command.help)}\n\n| option | |\n|---|---|"
        for names, text in filter(None, records):
            meaning = _cell(text).replace("[", "\\[")  # else a link
            yield f"| `{_cell(names)}` | {meaning} |"
    for name, each in below.items():
        yield from options(each, context, f"{path} {name}")


def _paragraphs(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """A page for each notebook, and its pictures."""
    from mkdocs.structure.files import File

    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        page, pictures = notebook(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![what the cell draws]({name})")
                continue
            text = ESCAPES.sub("", "".join(output.get("text") or data.get("text/plain") or ""))
            if text.strip():
                parts.append(f"```text\n{text.rstrip()}\n```")
    parts.append(f"*This is `examples/notebooks/{path.name}`, with the outputs that are stored in it.*")
    return "\n\n".join(parts), pictures
