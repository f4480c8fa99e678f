"""A line for whoever waits while kernels are compiled: once in a process, and only where it takes a while."""

from __future__ import annotations

import logging
import os
import sys
import threading
from time import perf_counter

log = logging.getLogger("snn_sparse_plugin")

AFTER = 1.0  # seconds

QUIET = "SNN_SPARSE_QUIET"
"""Environment variable: nothing is written to the terminal where it is set to anything but nothing or 0."""

_TEXT = (
    "compiling kernels for this processor, once, some seconds: the next process finds them "
    "(`snn-sparse warm` makes them ahead) …"
)
_told = False


class Notice:
    """Begins with a kernel that is not on disk. Its parts are compiled meanwhile, and begin none of their own."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self._name, self._began = owner, name, perf_counter()
        self._timer = threading.Timer(AFTER, tell)
        self._timer.daemon = True
        self._timer.start()

    def end(self, folder: str) -> None:
        self._timer.cancel()
        log.info("compiled %s in %.1f s, kept in %s", self._name, perf_counter() - self._began, folder)


def tell() -> None:
    """To the logger; and to standard error where that is a terminal, as few programs show what is logged as INFO."""
    global _told
    if _told:
        return
    _told = True
    log.info(_TEXT)
    shown = log.isEnabledFor(logging.INFO) and log.hasHandlers()
    if (
        not shown
        and os.environ.get(QUIET, "0") in ("", "0")
        and sys.stderr is not None
        and sys.stderr.isatty()
    ):
        print(f"snn-sparse-plugin: {_TEXT}", file=sys.stderr, flush=True)
