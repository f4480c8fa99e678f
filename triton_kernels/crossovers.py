"""Where one way to multiply begins to beat another: measured numbers of a card, in one table.

The built-in table was measured on an H100. ``snn-sparse tune`` measures another card and writes a file with its name to
``$SNN_SPARSE_CACHE_DIR/crossovers``, by default ``~/.cache/snn-sparse-plugin/crossovers``.
"""

from __future__ import annotations

import json
import logging
import math
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files import write_text
from .sources import cache_folder

log = logging.getLogger("snn_sparse_plugin")

Limits = tuple[tuple[float, float], ...]  # (width, limit): for outputs up to this wide


class Crossovers(NamedTuple):
    """``rows`` are added for events below a density; it depends on what else would multiply, and on the width."""

    rows_below_float32: Limits
    rows_below_tf32: Limits
    rows_below_terms: Limits
    terms_from: float
    """Multiply-adds of a product, R * M * N, from which bf16 terms beat the library's float32 product."""


_LIMITS = Crossovers._fields[:3]

H100 = Crossovers(
    # 32000 x 700 -> 200: rows 0.053 ms at 2 %, 0.158 at 10 %; float32 0.244, TF32 0.091.
    # 128000 x 1000 -> 1000: rows 1.59 ms at 3 %; float32 5.32, TF32 0.90
    rows_below_float32=((256, 0.13), (math.inf, 0.10)),
    rows_below_tf32=((256, 0.04), (math.inf, 0.015)),
    # terms 0.16 and 1.09 ms, without the time to unpack the bits, for which the limits stand higher
    rows_below_terms=((256, 0.20), (math.inf, 0.05)),
    # the smallest that was measured: 32000 x 200 -> 200, 0.033 ms against 0.081
    terms_from=32000 * 200 * 200,
)
# what nobody measured multiplies by terms nowhere: cards differ most in how much faster bf16 is than float32
UNMEASURED = H100._replace(terms_from=math.inf)


def limit(limits: Limits, width: int) -> float:
    """The entry for outputs of this width."""
    return next(value for widest, value in limits if width <= widest)


def name_of(device: torch.device) -> str:
    """What the table of a device is kept under."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def of_device(device: torch.device) -> Crossovers:
    """The table of a device: its own file, read once, or the built-in one."""
    name = name_of(device)
    path = file_of(name)
    try:
        return read(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning(
            "%s cannot be read (%s): the built-in table of an H100 is used. Delete it, or run `snn-sparse tune`.",
            path,
            error,
        )
    return H100 if "H100" in name else UNMEASURED


def file_of(name: str) -> Path:
    """Where the table of the device with this name is kept."""
    return cache_folder() / "crossovers" / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}.json"


def read(path: Path) -> Crossovers:
    """The table in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a table.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError("not a table of crossovers")
    try:
        tables = [tuple((_number(w), _number(x)) for w, x in data[name]) for name in _LIMITS]
        found = Crossovers(*tables, _number(data["terms_from"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a table of crossovers: {error!r}") from error
    if any(not limits or limits[-1][0] != math.inf for limits in found[:3]):
        raise ValueError("not a table of crossovers: the last width of each limit is null")
    return found


def write(path: Path, table: Crossovers, **about: str) -> None:
    """Write a table, and what it is ``about``, so that :func:`read` reads it.

    Raises:
        FileError: it cannot be written.
    """
    write_text(path, json.dumps(about | plain(table), indent=2) + "\n")
    of_device.cache_clear()


def plain(table: Crossovers) -> dict[str, Any]:
    """A table as JSON has it."""
    limits = {name: [[_plain(w), _plain(x)] for w, x in getattr(table, name)] for name in _LIMITS}
    return limits | {"terms_from": _plain(table.terms_from)}


def _number(x: object) -> float:
    """JSON has no infinity: null stands for it."""
    if x is None:
        return math.inf
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not x >= 0:
        raise ValueError(f"not a table of crossovers: {x!r} is no limit")
    return float(x)


def _plain(x: float) -> float | None:
    return None if math.isinf(x) else x
