"""The files of a study: a folder for one process, JSON and tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from ..files import write_text

try:
    import fcntl
except ImportError:  # not on Windows, where nobody looks after two runs in one folder
    fcntl = None  # type: ignore[assignment]


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other processes out of it inside the block; a kill lets them in again.

    Raises:
        ConfigError: another process is inside, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to: {error}.") from error
    with lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process works in {folder}: wait for it, or give another --out."
            ) from None
        except OSError:  # a file system without locks
            pass
        for left in folder.rglob(".*.part"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)
        yield


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2) + "\n")


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A table whose columns are all keys of the rows; a list takes a column for each entry, ``name_1`` on."""
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(flat)
    write_text(path, text.getvalue())


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, list):
            out |= {f"{name}_{k}": each for k, each in enumerate(value, start=1)}
        else:
            out[name] = value
    return out
