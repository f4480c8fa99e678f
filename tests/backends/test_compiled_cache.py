"""Compiled kernels are used again, but not after any source beside them has changed."""

import importlib
import sys

from snn_sparse_plugin.backends.cpu import jit

SOURCE = """
from snn_sparse_plugin.backends.cpu.jit import kernel

@kernel()
def double(x):
    return 2 * x
"""


def test_the_cache_counts_for_one_state_of_all_sources(tmp_path, monkeypatch):
    (tmp_path / "cached_kernel.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)

    def hits():
        sys.modules.pop("cached_kernel", None)
        double = importlib.import_module("cached_kernel").double
        assert double(3) == 6
        return sum(double.stats.cache_hits.values())

    assert hits() == 0
    assert hits() == 1
    monkeypatch.setattr(jit, "sources", lambda: "edited")
    assert hits() == 0
    assert hits() == 1
    monkeypatch.undo()
    sys.modules.pop("cached_kernel", None)
