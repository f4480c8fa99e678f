"""The version of the package, which is said here and in ``pyproject.toml``."""

VERSION = "0.1.0"
