"""The notebooks of examples/ run from top to bottom, each in a fresh namespace, and carry the outputs of such a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))
NEEDS = {"norse_sequential": "norse.torch"}


@pytest.fixture(scope="module")
def shell() -> Any:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    testing = pytest.importorskip("IPython.testing.globalipapp", reason="IPython is not installed")
    return testing.start_ipython() or testing.get_ipython()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(NEEDS.get(path.stem, "snntorch"), reason="its library is not installed")
    shell.reset(new_session=False)
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            result = shell.run_cell("".join(cell["source"]))
            assert result.success, capsys.readouterr().out[-3000:]


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_are_stored(path: Path) -> None:
    """Whoever reads it where nothing runs sees the plots."""
    assert path.stat().st_size < 300_000, "draw smaller pictures"
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), (
        "run it from top to bottom"
    )
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    assert not re.search(r"/(home|tmp|root|work|Users)/", json.dumps(outputs)), "a path of one machine"
