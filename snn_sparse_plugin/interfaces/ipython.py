"""``%load_ext snn_sparse_plugin``: the magic ``%%snn_sparse`` runs a notebook cell in sparse mode."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .session import sparse_session


def load_ipython_extension(shell: Any) -> None:
    """Register the magic; IPython calls this."""
    shell.register_magic_function(_in_sparse_mode(shell), "cell", "snn_sparse")


def _in_sparse_mode(shell: Any) -> Any:
    def snn_sparse(line: str, cell: str) -> None:
        """Run the cell in sparse mode, with a summary at its end.

        Options of SparseConfig may follow: %%snn_sparse backprop_threshold=0.2 fuse_time=False
        """
        __tracebackhide__ = True  # IPython leaves this frame out of the traceback
        session = None
        try:
            with sparse_session(**options_of(line)) as session:
                with _silent(shell):
                    result = shell.run_cell(cell)
                result.raise_error()
        finally:
            if session is not None:
                for text in session.lines():
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


def options_of(line: str) -> dict[str, Any]:
    """``"backend=cpu backprop_threshold=0.2"`` as a dict; what is no Python literal is a string.

    Example:
        >>> options_of("backprop_threshold=None backend=cpu")
        {'backprop_threshold': None, 'backend': 'cpu'}
    """
    found = {}
    for part in line.split():
        name, _, text = part.partition("=")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found
