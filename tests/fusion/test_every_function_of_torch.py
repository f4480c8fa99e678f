"""No call on a recorded step ends the interpreter or gives what it would not give on an ordinary tensor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("snntorch")

import torch
from reach import _BY_HAND, calls

# in C++, views that keep the gradient, of which C++ takes note before anybody is asked
REFUSED = {"Tensor", "torch.alias_copy(x)"}


def run(first: int, last: int, step: int) -> list[str]:
    """What was reported on these calls, made in a process of their own."""
    program = [
        sys.executable,
        "-W",
        "ignore",
        Path(__file__).with_name("reach.py"),
        *map(str, (first, last, step)),
    ]
    done = subprocess.run(program, capture_output=True, text=True, timeout=1200)
    lines = done.stdout.splitlines()
    last_call = next((line for line in reversed(lines) if line.startswith("CALL")), "none")
    assert done.returncode == 0, f"exit code {done.returncode} in {last_call}\n{done.stderr[-2000:]}"
    assert lines[-1] == "END"
    return [line for line in lines if line.startswith(("BAD", "CLEAR"))]


def check(reports: list[str]) -> None:
    bad = [line for line in reports if line.startswith("BAD") or line.split(" ")[1] not in REFUSED]
    assert not bad, "\n".join(bad)


def test_functions_of_every_kind() -> None:
    check(run(0, len(_BY_HAND), 1))


def test_one_in_thirty_of_all_functions() -> None:
    check(run(len(_BY_HAND), len(calls()), 31))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_all_functions(part: int) -> None:
    check(run(part, len(calls()), 8))


def test_a_refused_call_works_the_second_time() -> None:
    import snntorch

    import snn_sparse_plugin as ssp
    from snn_sparse_plugin.core.errors import FusionError

    layer, neuron = torch.nn.Linear(5, 4), snntorch.Leaky(beta=0.9)
    with ssp.sparse_mode():
        _, mem = neuron(layer(torch.ones(3, 5)), torch.zeros(3, 4))
        with pytest.raises(FusionError, match="works from here on"):
            torch.Tensor(mem)
        again = torch.Tensor(mem)
    (again.sum()).backward()
    assert layer.weight.grad is not None
