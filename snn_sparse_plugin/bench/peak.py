"""The child process of a peak-memory measurement: request as JSON on stdin, ``{"peak": bytes}`` on stdout."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from .measure import run_step
from .problem import Config
from .providers import setup


def measure_peak(request: dict[str, Any]) -> int | None:
    """Highest memory during two steps minus what was in use before, in bytes; None if it cannot be told."""
    # JSON knows no tuples
    raw: Any = {name: tuple(x) if isinstance(x, list) else x for name, x in request["config"].items()}
    config = Config(**raw)
    torch.set_num_threads(request["threads"])
    provider = request["provider"]
    run_step(setup(replace(config, steps=3, batch=2), provider))  # compiles kernels, loads libraries
    steps = setup(config, provider)
    _return_free_memory()
    if not _reset_high_water_mark():
        return None
    before = _status("VmRSS")
    run_step(steps)
    run_step(steps)
    return max(0, _status("VmHWM") - before)


def _return_free_memory() -> None:
    # what malloc keeps after the preparation would hide as much of the steps' own need
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_high_water_mark() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}.")


if __name__ == "__main__":
    print(json.dumps({"peak": measure_peak(json.load(sys.stdin))}))
