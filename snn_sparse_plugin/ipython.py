"""``%load_ext snn_sparse_plugin``: the magic ``%%snn_sparse`` runs a notebook cell in sparse mode."""

from __future__ import annotations

import ast
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
        with sparse_session(**options_of(line)) as session:
            result = shell.run_cell(cell)
        for text in session.lines():
            print(text)
        result.raise_error()

    return snn_sparse


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
