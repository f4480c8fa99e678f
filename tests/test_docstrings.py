"""The examples in docstrings run, and show what is written."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import snn_sparse_plugin


def modules() -> list[str]:
    """All of the package; the kernels, which need Triton, have no examples."""
    found = pkgutil.walk_packages(snn_sparse_plugin.__path__, "snn_sparse_plugin.")
    return [m.name for m in found if "triton_kernels" not in m.name and not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", modules())
def test_examples(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write a file
    try:
        module = importlib.import_module(name)
    except (ImportError, snn_sparse_plugin.SparsePluginError) as error:
        pytest.skip(f"an optional part is missing: {error}")
    finder = doctest.DocTestFinder(exclude_empty=True)
    # the classes of the import-swap faces, which stand on no line of theirs, have upstream's docstrings
    tests = [test for test in finder.find(module, name) if test.examples and test.lineno is not None]
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        torch.manual_seed(0)
        written: list[str] = []
        assert runner.run(test, out=written.append).failed == 0, "".join(written)


def test_there_are_examples() -> None:
    """The public names are shown in use; the errors by their base."""
    finder = doctest.DocTestFinder()
    missing = {
        name
        for name in snn_sparse_plugin.__all__
        if name == "SparsePluginError" or not name.endswith("Error")
        if not any(test.examples for test in finder.find(getattr(snn_sparse_plugin, name), name))
    }
    assert missing == set()
