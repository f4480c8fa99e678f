"""``%load_ext snn_sparse_plugin``: the magic ``%%snn_sparse`` runs a notebook cell in sparse mode."""

from __future__ import annotations

import argparse
import ast
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, NoReturn

from ..core.config import SparseConfig
from ..core.errors import ConfigError
from ..core.lines import terminal_width
from .session import sparse_session, threshold_of


def load_ipython_extension(shell: Any) -> None:
    """Register the magic; IPython calls this."""
    shell.register_magic_function(_in_sparse_mode(shell), "line_cell", "snn_sparse")


def _in_sparse_mode(shell: Any) -> Any:
    def snn_sparse(line: str, cell: str | None = None) -> None:
        """Run the cell in sparse mode, with a summary at its end; %%snn_sparse --help lists the options."""
        __tracebackhide__ = True  # IPython leaves this frame out of the traceback
        options = options_of(line)
        if cell is None or options.pop("help"):
            print(_parser().format_help())
            return
        quiet, session = options.pop("quiet"), None
        try:
            with sparse_session(**options) as session:
                with _silent(shell):
                    result = shell.run_cell(cell)
                result.raise_error()
        finally:
            if session is not None and not quiet:
                for text in session.lines(terminal_width()):
                    print(text)

    return snn_sparse


@contextmanager
def _silent(shell: Any) -> Iterator[None]:
    """Inside, the shell shows no error: the cell that holds the magic shows the one that it raises."""
    names = ("showtraceback", "showsyntaxerror", "showindentationerror")
    before = {name: vars(shell)[name] for name in names if name in vars(shell)}
    for name in names:
        setattr(shell, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name in names:
            delattr(shell, name)
        vars(shell).update(before)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"%%snn_sparse: {message}. %%snn_sparse --help lists the options.")


def _parser() -> argparse.ArgumentParser:
    """The options of ``snn-sparse run``, as they are spelled there."""
    parser = _Parser(
        prog="%%snn_sparse",
        description="Run the cell in sparse mode, and say at its end what ran sparse.",
        epilog="Options may also be written as in Python: %%snn_sparse backprop_threshold=0.2 fuse_time=False",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add(
        *("--backprop-threshold", "--threshold"),
        type=threshold_of,
        metavar="X",
        help="auto, exact, or a distance from the threshold",
    )
    add(
        "--exact",
        dest="backprop_threshold",
        action="store_const",
        const=None,
        help="the same as --backprop-threshold exact",
    )
    add("--backend", help="auto, or the name of a backend")
    add(
        "--min-active",
        type=float,
        metavar="SHARE",
        help="share of active neuron-steps below which a call runs exact",
    )
    add(
        "--fuse-time",
        action=argparse.BooleanOptionalAction,
        help="run step loops as fused calls over all steps (the default)",
    )
    add("--max-steps", type=int, metavar="STEPS", help="run a recorded loop after so many steps")
    add("--check", action="store_true", help="check that inputs and weights are finite")
    add("-q", "--quiet", action="store_true", default=False, help="no summary at the end")
    add("-h", "--help", action="store_true", default=False, help="show this message; the cell does not run")
    return parser


def options_of(line: str) -> dict[str, Any]:
    """The options behind the magic, as in a command or as in Python, with ``help`` and ``quiet``.

    Raises:
        ConfigError: an option that there is not, with the one that was probably meant.

    Example:
        >>> options_of("--backprop-threshold 0.2 backend=cpu fuse_time=False -q")
        {'quiet': True, 'help': False, 'backprop_threshold': 0.2, 'backend': 'cpu', 'fuse_time': False}
    """
    words = shlex.split(line)
    in_python = [word for word in words if "=" in word and not word.startswith("-")]
    found, unknown = _parser().parse_known_args([word for word in words if word not in in_python])
    options = vars(found)
    known = [option.name for option in fields(SparseConfig)]
    for word in unknown:
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        close = get_close_matches(name, [*known, "exact", "quiet", "help"], 1)
        meant = f": did you mean --{close[0].replace('_', '-')}?" if close else "."
        raise ConfigError(f"%%snn_sparse has no option {word!r}{meant} %%snn_sparse --help lists them.")
    for word in in_python:
        name, _, text = word.partition("=")
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[name] = threshold_of(text) if name == "backprop_threshold" else text
    return options
