"""What the commands share: errors in one line, consoles, numbers in an option."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ...core.errors import ConfigError, SparsePluginError

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training images.")]
TrainingImages = Annotated[int, typer.Option(min=0, help="Training images to use; 0 is all.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


def short(command: Callable[..., Any]) -> str:
    """A command's line in a list of commands: all of its first, of which a narrow terminal would cut the end."""
    return (inspect.getdoc(command) or "").partition("\n")[0]


@contextmanager
def readable_errors(context: typer.Context) -> Iterator[None]:
    """Errors of this package end the command in one line; ``--debug`` lets them through."""
    try:
        yield
    except SparsePluginError as error:
        if context.obj["debug"]:
            raise
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escaped(str(error))}", highlight=False)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error


def consoles(as_json: bool) -> tuple[Console, Callable[[Any], None]]:
    """A console for people, and a printer of JSON; with ``--json`` the console writes to stderr."""
    return Console(stderr=as_json), lambda data: print(json.dumps(data, indent=2), file=sys.stdout)


def escaped(text: str) -> str:
    return text.replace("[", r"\[")


def numbers(text: str, option: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """The numbers of an option that takes several, comma-separated."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} takes numbers separated by commas, got {text!r}.") from error


def check_writable(path: Path) -> None:
    """Raise :class:`ConfigError` where a file could not be written at the end of the work, before it begins."""
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(
            f"{path} cannot be written: its folder is to exist, and it is not to be one itself."
        )
