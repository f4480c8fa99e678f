"""Kernels give back every array that they make: most count no references, so a wrong one would keep it for good."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import snntorch as snn
import torch
from numba.core.runtime import _nrt_python, rtsys
from snntorch import surrogate, utils
from torch import nn

from snn_sparse_plugin import SpikeTrain, unroll
from snn_sparse_plugin.backends import cpu
from snn_sparse_plugin.learners import eprop

M, N, T, B = 40, 24, 20, 3
OPTIONS: dict[str, Any] = {"init_hidden": True}
NARROW: dict[str, Any] = {**OPTIONS, "spike_grad": surrogate.fast_sigmoid(100)}
HIDDEN: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: snn.Leaky(0.9, **OPTIONS),
    "synaptic": lambda: snn.Synaptic(0.8, 0.9, **OPTIONS),
    "reset to zero": lambda: snn.Leaky(0.9, reset_mechanism="zero", **OPTIONS),
    "learned decay": lambda: snn.Leaky(0.9, learn_beta=True, **OPTIONS),
    "recurrent": lambda: snn.RLeaky(0.9, linear_features=N, **OPTIONS),
    "program": lambda: snn.Alpha(0.9, 0.8, **OPTIONS),
    "listed, one decay": lambda: snn.Leaky(0.9, **NARROW),
    "listed, decays": lambda: snn.Leaky(torch.linspace(0.8, 0.95, N), **NARROW),
    "listed, reset to zero": lambda: snn.Leaky(0.9, reset_mechanism="zero", **NARROW),
    "listed, recurrent": lambda: snn.RLeaky(0.9, linear_features=N, **NARROW),
}


def kernels() -> Iterator[tuple[str, ast.FunctionDef, bool]]:
    """Kernels and parts of kernels by name, and whether they say that they allocate."""
    for path in Path(cpu.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.decorator_list:
                decorators = " ".join(ast.unparse(each) for each in node.decorator_list)
                if any(name in decorators for name in ("kernel", "_inline", "_reordered")):
                    yield f"{path.stem}.{node.name}", node, "allocates=True" in decorators


def test_who_is_given_an_array_says_so() -> None:
    makers = {node.name for _, node, allocates in kernels() if allocates and returns(node)}
    assert {"room", "rows_of_entries", "sort_events"} <= makers
    silent = {name: called(node) & makers for name, node, allocates in kernels() if not allocates}
    assert {name: found for name, found in silent.items() if found} == {}


def returns(function: ast.FunctionDef) -> bool:
    return any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(function))


def called(function: ast.FunctionDef) -> set[str]:
    calls = (node for node in ast.walk(function) if isinstance(node, ast.Call))
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


@pytest.fixture
def kept() -> Iterator[Callable[[], int]]:
    """How many arrays kernels have made and not given back."""
    before = _nrt_python.memsys_stats_enabled()
    _nrt_python.memsys_enable_stats()

    def count() -> int:
        stats = rtsys.get_allocation_stats()
        return int(stats.mi_alloc - stats.mi_free)

    yield count
    if not before:
        _nrt_python.memsys_disable_stats()


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_training_step_keeps_no_array(kind: str, kept: Callable[[], int]) -> None:
    readout = snn.Leaky(0.9, reset_mechanism="none", output=True, **OPTIONS)
    net = nn.Sequential(nn.Linear(M, N), HIDDEN[kind](), nn.Linear(N, 10), readout)
    x = (torch.rand(T, B, M) < 0.2).float()

    def step() -> None:
        utils.reset(net)
        out = unroll(net, SpikeTrain.from_dense(x))
        out.mem.mean(0).sum().backward()  # type: ignore[union-attr]

    step()
    before = kept()
    for _ in range(3):
        step()
    assert kept() == before


@pytest.mark.parametrize("engine", ["chunk", "offline"])
def test_an_online_learner_keeps_no_array(engine: str, kept: Callable[[], int]) -> None:
    net, x = eprop.LSNNNetwork(M, N, 3), (torch.rand(T, B, M) < 0.2).float()

    def run() -> None:
        with eprop.EProp(net, engine=engine, chunk=5) as learner:
            learner.run(x, lambda y, _: y.square().sum())
            assert learner.compiled is not None

    run()
    before = kept()
    for _ in range(3):
        run()
    assert kept() == before
