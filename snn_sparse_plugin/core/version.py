"""What ran: the version of this package, those of others, and the commit."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VERSION = "0.2.0"
"""Is said here, in ``pyproject.toml`` and in ``CITATION.cff``."""


def installed(distribution: str) -> str | None:
    """The version of a distribution, or None. Nothing is imported."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


@cache
def commit() -> str | None:
    """The commit of the checkout this package runs from, ``+`` if it has changes; None if installed."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--match=", "--dirty=+"]
    try:
        # a wheel may lie in a virtual environment inside somebody else's checkout: that commit is not ours
        ours = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", __file__],
            capture_output=True,
            check=False,
        )
        if ours.returncode != 0:
            return None
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
