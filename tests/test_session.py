"""Scripts and notebook cells in sparse mode: what is counted, and how errors are shown."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

import snn_sparse_plugin as ssp
from snn_sparse_plugin.core import tally
from snn_sparse_plugin.interfaces.session import sparse_session

snntorch = pytest.importorskip("snntorch")


@pytest.fixture(autouse=True)
def _fresh():
    tally.clear()


def loop(lif, steps=20):  # enough for recording to pay
    mem = torch.zeros(2, 3)
    for _ in range(steps):
        _, mem = lif(torch.rand(2, 3), mem)
    return mem.sum()


def test_every_session_counts_the_modules_that_ran_in_it():
    first, second = snntorch.Leaky(0.9), snntorch.Leaky(0.9)
    found = []
    for lifs in ([first, second], [first], [first, second], []):
        with sparse_session() as session:
            for lif in lifs:
                loop(lif)
        found.append({kind: (runs.calls, runs.modules) for kind, runs in session.classes.items()})
    two, one = ({"Leaky": ({"fused": n}, {"fused": n})} for n in (2, 1))
    assert found == [two, one, two, {}]
    assert tally.by_class()["Leaky"].calls == {"fused": 5}
    assert tally.by_class()["Leaky"].modules == {"fused": 2}


def test_why_modules_stepped_is_of_each_session():
    lif = snntorch.Leaky(0.9)
    for _ in range(2):
        with sparse_session(fuse_time=False) as session:
            loop(lif)
        assert sum(session.classes["Leaky"].reasons.values()) == 1
        lif.state_quant = lambda x: x
        with sparse_session() as session:
            loop(lif)
        (reason,) = session.classes["Leaky"].reasons
        assert reason.startswith("state_quant")
        lif.state_quant = False


def test_sessions_nest_and_modules_that_die_stay_counted():
    with sparse_session() as outer:
        loop(snntorch.Leaky(0.9))
        with sparse_session() as inner:
            loop(snntorch.Leaky(0.9))
            snntorch.SpikingNeuron.instances.clear()
    assert inner.classes["Leaky"].modules == {"fused": 1}
    assert outer.classes["Leaky"].modules == {"fused": 2}


def test_a_session_that_fails_keeps_its_account_and_closes_it():
    with pytest.raises(ZeroDivisionError), sparse_session() as session:  # noqa: PT012
        loop(snntorch.Leaky(0.9)).item()
        raise ZeroDivisionError
    assert session.classes["Leaky"].calls == {"fused": 1}
    with ssp.sparse_mode():
        loop(snntorch.Leaky(0.9))
    assert session.classes["Leaky"].calls == {"fused": 1}


@pytest.fixture(scope="module")
def shell():
    testing = pytest.importorskip("IPython.testing.globalipapp")
    found = testing.start_ipython() or testing.get_ipython()
    found.run_line_magic("load_ext", "snn_sparse_plugin")
    found.run_cell("import torch, snntorch\nlif, mem = snntorch.Leaky(0.9), torch.zeros(2, 3)")
    return found


def test_a_second_cell_counts_like_the_first(shell, capsys):
    cell = "%%snn_sparse\nfor _ in range(4):\n    spk, mem = lif(torch.rand(2, 3), mem)\ntotal = spk.sum()"
    for _ in range(2):
        assert shell.run_cell(cell).success
        shown = capsys.readouterr().out
        assert "Leaky   1 in 1" in shown
        assert "modules: 1 ran fused, 0 step by step" in shown


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("1/0", "ZeroDivisionError: division by zero"),
        ("x = = 3", "SyntaxError: invalid syntax"),
        ("  y = 1\n z = 2", "IndentationError"),
        ("%no_such_magic", "UsageError: Line magic"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
    ],
)
def test_an_error_in_a_cell_is_shown_once_and_fails_the_cell(shell, body, name, capsys):
    result = shell.run_cell(f"%%snn_sparse\n{body}")
    assert not result.success
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count(name) == 1
    assert "no spiking neuron" in shown.out
    shell.run_cell("1/0")  # the shell shows errors of other cells as before
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().out


def test_a_wrong_option_of_a_cell_is_shown_once(shell, capsys):
    assert not shell.run_cell("%%snn_sparse backend=cuda\npass").success
    assert capsys.readouterr().out.count("UnsupportedError: no backend named 'cuda'") == 1


@pytest.mark.parametrize(
    "line",
    [
        "--backprop-threshold 0.2 --no-fuse-time",
        "--threshold=0.2 fuse_time=False",
        "backprop_threshold=0.2 fuse_time=0>1",
    ],
)
def test_options_of_a_cell_are_those_of_the_command_and_of_python(shell, line, capsys):
    if ">" in line:
        assert not shell.run_cell(f"%%snn_sparse {line}\npass").success
        assert "fuse_time must be True or False" in capsys.readouterr().out
        return
    body = "from snn_sparse_plugin.core.config import active_config\nprint(active_config())"
    assert shell.run_cell(f"%%snn_sparse {line} -q\n{body}").success
    shown = capsys.readouterr().out
    assert "backprop_threshold=0.2" in shown
    assert "fuse_time=False" in shown
    assert "no spiking neuron" not in shown


@pytest.mark.parametrize("magic", ["%%snn_sparse --help\n1/0", "%snn_sparse"])
def test_help_of_the_magic(shell, magic, capsys):
    assert shell.run_cell(magic).success
    shown = capsys.readouterr().out
    for option in fields(ssp.SparseConfig):
        assert f"--{option.name.replace('_', '-')}" in shown


def test_a_mistyped_option_of_a_cell_is_told_the_right_one(shell, capsys):
    assert not shell.run_cell("%%snn_sparse --exct\npass").success
    assert "did you mean --exact?" in capsys.readouterr().out
