"""What the first loop of a process imports and compiles, and `snn-sparse warm`."""

import json
import logging
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from snn_sparse_plugin.backends.cpu import notice
from snn_sparse_plugin.backends.cpu.forward import forward_kernel
from snn_sparse_plugin.backends.cpu.rows import encode
from snn_sparse_plugin.core.dynamics import NeuronSpec
from snn_sparse_plugin.interfaces import warm
from snn_sparse_plugin.interfaces.cli import app

LOOP = """
import json, sys
import torch
import snntorch as snn
before = set(sys.modules)
import snn_sparse_plugin
torch.set_num_threads(1)
torch.manual_seed(0)

fc, lif, x = torch.nn.Linear(5, 4), snn.Leaky(beta=0.9), (torch.rand(6, 2, 5) < 0.5).float()

def train(mode):
    with snn_sparse_plugin.sparse_mode(**mode):
        mem, out = lif.init_leaky(), []
        for step in x:
            spikes, mem = lif(fc(step), mem)
            out.append(spikes)
        torch.stack(out).sum().backward()

def use(x):  # what people do with steps besides
    fc.zero_grad()
    with snn_sparse_plugin.sparse_mode():
        mem, out, counts, best = torch.zeros(2, 4), [], torch.zeros(2, 4), torch.zeros(2, 4)
        kept = torch.zeros(len(x), 2, 4)
        for t, step in enumerate(x):
            spikes, mem = lif(torch.relu(fc(step) - 0.1 * mem), mem)
            out.append(torch.sigmoid(mem) * (spikes > 0).float())
            counts += spikes
            best = torch.maximum(best, mem.clamp(min=0.0))
            kept.index_copy_(0, torch.tensor([t]), mem.unsqueeze(0))
        loss = torch.stack(out).mean(0).sum() + torch.log_softmax(counts, 1).amax()
        loss = loss + best.softmax(1).mean() + kept.mean()
    loss.backward()

use(x)
train({})
train({"backprop_threshold": None})
train({"backprop_threshold": 0.2, "min_active": 0.0})
with torch.no_grad():
    with snn_sparse_plugin.sparse_mode():
        mem = lif.init_leaky()
        print(float(lif(fc(x[0]), mem)[0].sum()), file=sys.stderr)

from numba.core.dispatcher import Dispatcher
import gc
kernels = {}
for x in gc.get_objects():
    ours = isinstance(x, Dispatcher) and x.__module__.startswith("snn_sparse_plugin") and x.overloads
    if ours and not x.targetoptions["no_cpython_wrapper"]:  # no part
        misses, hits = x.stats.cache_misses, x.stats.cache_hits
        kernels[x.py_func.__name__] = [len(x.overloads), sum(misses.values()), sum(hits.values())]
print(json.dumps({"imported": sorted(set(sys.modules) - before), "kernels": kernels}))
"""
NEVER = (
    *("triton", "scipy.linalg", "sympy", "mpmath", "rich", "typer", "matplotlib", "sklearn", "norse"),
    *("torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes"),
)
"""What a loop does not need. numba imports scipy itself, without its parts, to look at its version."""


def first_loop(folder) -> dict:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    out = subprocess.run(
        [sys.executable, "-c", LOOP], env=environment, capture_output=True, text=True, timeout=400
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return first_loop(folder), first_loop(folder)


def test_the_first_loop_imports_nothing_it_does_not_need(loops):
    for loop in loops:
        assert not [name for name in NEVER if name in loop["imported"]]


def test_one_specialisation_of_each_kernel_serves_a_loop_in_every_mode(loops):
    fresh, _ = loops
    several = {name: numbers[0] for name, numbers in fresh["kernels"].items() if numbers[0] > 1}
    assert not several
    assert {"forward", "backward_replay_linear"} <= set(fresh["kernels"])


def test_a_second_process_compiles_nothing(loops):
    _, again = loops
    assert {name: numbers for name, numbers in again["kernels"].items() if numbers[1]} == {}
    assert again["kernels"]["forward"][2] == 1


def test_kernels_from_disk_register_nothing_that_only_a_compilation_asks_for(loops):
    _, again = loops
    assert "numba.np.random.generator_methods" not in again["imported"]


def test_one_forward_serves_with_and_without_a_reset():
    def kernel(**spec):
        run = forward_kernel(encode(NeuronSpec(**spec), False), np.dtype("float32")).args[0]
        assert run.py_func.__name__ == "forward"
        return run

    assert kernel(reset="none") is kernel(reset="subtract")
    assert kernel(reset="none", synapse=True) is kernel(reset="subtract", synapse=True)
    assert kernel(reset="zero") is not kernel(reset="subtract")


def test_warm_compiles_into_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(warm, "USUAL", warm.USUAL[-1:])
    result = CliRunner().invoke(app, ["warm", "--jobs", "1"])
    assert result.exit_code == 0, result.output
    assert list(tmp_path.rglob("forward.*.nbc"))


def test_warm_for_a_gpu_says_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["warm", "--gpu"])
    assert result.exit_code == 1
    assert "torch sees none" in result.output


@pytest.fixture
def said(monkeypatch, caplog):
    monkeypatch.setattr(notice, "AFTER", 0.01)
    monkeypatch.setattr(notice, "_told", False)
    caplog.set_level(logging.INFO, logger="snn_sparse_plugin")
    return caplog


def test_a_long_compilation_is_said_once(said):
    for _ in range(2):
        waiting = notice.Notice(None, "forward")
        time.sleep(0.1)
        waiting.end("there")
    lines = [line for line in said.messages if "compiling kernels" in line]
    assert len(lines) == 1
    assert "snn-sparse warm" in lines[0]


def test_a_short_compilation_is_not_said(said, monkeypatch):
    monkeypatch.setattr(notice, "AFTER", 5.0)
    notice.Notice(None, "forward").end("there")
    assert not [line for line in said.messages if "compiling kernels" in line]


@pytest.mark.parametrize(
    ("terminal", "quiet", "shown"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_the_line_goes_to_a_terminal_alone(monkeypatch, capsys, terminal, quiet, shown):
    monkeypatch.setattr(notice, "_told", False)
    monkeypatch.setenv(notice.QUIET, quiet)
    monkeypatch.setattr(notice.log, "isEnabledFor", lambda level: False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    notice.tell()
    assert ("compiling kernels" in capsys.readouterr().err) is shown
