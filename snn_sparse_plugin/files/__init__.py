"""Files that are whole at any moment, and errors in one line for those that are not what they should be."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import IO, Any

from ..core.errors import FileError, InputError, SparsePluginError

_ADVICE = {
    errno.ENOSPC: "make room there, or give another place",
    errno.EDQUOT: "make room there, or give another place",
    errno.EACCES: "give a place that you may write to",
    errno.EPERM: "give a place that you may write to",
    errno.EROFS: "give a place that you may write to",
}


def write_atomic(path: str | PathLike[str], write: Callable[[IO[bytes]], Any]) -> None:
    """What ``write(file)`` writes is at ``path`` as a whole or not at all, whenever the process is killed.

    Raises:
        FileError: it cannot be written; what was there before is as it was, and nothing is left beside it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a"
        >>> write_atomic(path, lambda file: file.write(b"all"))
        >>> path.read_bytes()
        b'all'
    """
    data = io.BytesIO()  # in memory first: torch's writer hides the reason for which a disk refuses
    write(data)
    place = Path(os.path.realpath(path))  # a link stays one
    try:
        if place.exists() and not place.is_file():  # such as /dev/stdout
            place.write_bytes(data.getbuffer())
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        _replace(place, data.getbuffer())
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "give another place")
        raise FileError(
            f"{path} cannot be written ({error.strerror or error}): {advice}. What was there before is as it was."
        ) from error


def _replace(place: Path, data: memoryview) -> None:
    # a name of this writer's own: several may write one file, and the last one stays
    part = place.with_name(f".{place.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | PathLike[str], text: str) -> None:
    """As :func:`write_atomic`."""
    write_atomic(path, lambda file: file.write(text.encode()))


@contextmanager
def reading(path: str | PathLike[str], what: str, advice: str = "") -> Iterator[None]:
    """A parser's error inside the block is raised as an :class:`InputError` of one line: ``path`` is not ``what``.

    Example:
        >>> with reading("a", "b", "Fetch it."):
        ...     raise ValueError("no rows")
        Traceback (most recent call last):
        ...
        snn_sparse_plugin.core.errors.InputError: a is not b, or it is damaged and cannot be read: no rows. Fetch it.
    """
    try:
        yield
    except SparsePluginError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} cannot be read: there is no file of this name.") from None
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # parsers of foreign bytes raise nearly everything, MemoryError too
        said = f"{path} is not {what}, or it is damaged and cannot be read: {reason(error)}."
        raise InputError(f"{said} {advice}".rstrip()) from error


def reason(error: BaseException) -> str:
    """The first line of an error, or its class where it says nothing."""
    said = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip().splitlines()
    return printable(said[0].strip().rstrip(".:")[:200]) if said else type(error).__name__


def printable(text: str) -> str:
    """Foreign text, such as a name in an archive, without what would break a line or steer a terminal.

    Example:
        >>> printable("a\\nb")
        'a?b'
    """
    return "".join(c if c.isprintable() else "?" for c in text)
