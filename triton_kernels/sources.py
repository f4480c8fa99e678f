"""Generated sources as modules: written to a folder, named by their content, and imported from there.

Triton reads a kernel's text from its file, so there has to be one. The folder is ``$SNN_SPARSE_CACHE_DIR/triton``, by
default ``~/.cache/snn-sparse-plugin/triton``; where it cannot be written, one that lives as long as the process.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
from functools import cache
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

log = logging.getLogger("snn_sparse_plugin")


def cache_folder() -> Path:
    """Where this package keeps what it made for this machine."""
    home = os.environ.get("SNN_SPARSE_CACHE_DIR")
    return Path(home) if home else Path.home() / ".cache" / "snn-sparse-plugin"


def folder() -> Path:
    """Where generated sources are kept."""
    return cache_folder() / "triton"


@cache
def module_of(source: str, name: str) -> ModuleType:
    """The module with this source; ``name`` says what it is in messages and profiles."""
    title = f"{name}_{sha256(source.encode()).hexdigest()[:16]}"
    path = _written(source, f"{title}.py")
    spec = spec_from_file_location(f"snn_sparse_plugin.generated.{title}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where inspect and pickle look for it
    spec.loader.exec_module(module)
    return module


def _written(source: str, name: str) -> Path:
    try:
        return _write(folder(), source, name)
    except OSError as error:
        log.warning(
            "generated kernels are kept for this process only, as %s cannot be written (%s)", folder(), error
        )
        return _write(_own_folder(), source, name)


def _write(home: Path, source: str, name: str) -> Path:
    path = home / name
    if _read(path) == source:  # a half-written one is written again
        return path
    home.mkdir(parents=True, exist_ok=True)
    descriptor, made = tempfile.mkstemp(dir=home, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(source)
        os.replace(made, path)  # whole or not at all, whoever else writes it
    except BaseException:
        Path(made).unlink(missing_ok=True)
        raise
    return path


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


@cache
def _own_folder() -> Path:
    home = Path(tempfile.mkdtemp(prefix="snn-sparse-triton-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home
