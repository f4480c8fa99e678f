"""The example that needs neither data nor another library runs and learns."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_neuron(capsys):
    runpy.run_path(str(EXAMPLES / "own_neuron.py"), run_name="__main__")
    assert "epoch 30: loss 0.00" in capsys.readouterr().out
