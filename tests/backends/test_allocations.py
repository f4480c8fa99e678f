"""Most kernels count no references: no array may come out of them or of what they call, and none is kept for good."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import snntorch as snn
import torch
from numba.core.errors import NumbaError
from numba.core.runtime import _nrt_python, rtsys
from snntorch import surrogate, utils
from torch import nn

from snn_sparse_plugin import SpikeTrain, unroll
from snn_sparse_plugin.backends.cpu.jit import kernel
from snn_sparse_plugin.backends.cpu.outgoing import new_rows
from snn_sparse_plugin.learners import eprop

M, N, T, B = 40, 24, 20, 3
OPTIONS: dict[str, Any] = {"init_hidden": True}
NARROW: dict[str, Any] = {**OPTIONS, "spike_grad": surrogate.fast_sigmoid(100)}
KINDS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "plain": ("replay", lambda: snn.Leaky(0.9, **OPTIONS)),
    "synaptic": ("replay", lambda: snn.Synaptic(0.8, 0.9, **OPTIONS)),
    "reset to zero": ("replay", lambda: snn.Leaky(0.9, reset_mechanism="zero", **OPTIONS)),
    "learned decay": ("replay", lambda: snn.Leaky(0.9, learn_beta=True, **OPTIONS)),
    "recurrent": ("replay", lambda: snn.RLeaky(0.9, linear_features=N, **OPTIONS)),
    "program": ("replay", lambda: snn.Alpha(0.9, 0.8, **OPTIONS)),
    "listed, one decay": ("impulses", lambda: snn.Leaky(0.9, **NARROW)),
    "listed, decays": ("list", lambda: snn.Leaky(torch.linspace(0.8, 0.95, N), **NARROW)),
    "listed, reset to zero": ("list", lambda: snn.Leaky(0.9, reset_mechanism="zero", **NARROW)),
    "listed, recurrent": ("list", lambda: snn.RLeaky(0.9, linear_features=N, **NARROW)),
}


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


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_keeps_no_array(
    kind: str, graded: bool, kept: Callable[[], int], counted: Counter[Any]
) -> None:
    way, hidden = KINDS[kind]
    readout = snn.Leaky(0.9, reset_mechanism="none", output=True, **OPTIONS)
    net = nn.Sequential(nn.Linear(M, N), hidden(), nn.Linear(N, 10), readout)
    x = (torch.rand(T, B, M) < 0.1).float() * (2.0 if graded else 1.0)

    def step() -> None:
        utils.reset(net)
        out = unroll(net, SpikeTrain.from_dense(x))
        out.mem.mean(0).sum().backward()  # type: ignore[union-attr]

    step()
    before = kept()
    counted.clear()
    for _ in range(3):
        step()
    assert kept() == before
    readouts = 3 if way == "list" else 0  # are listed, too
    assert counted["cpu", f"backward:{way}"] == 3 + readouts


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


@kernel(part=True)
def _views(x):  # type: ignore[no-untyped-def]
    return x[1:], 1


@kernel(part=True, allocates=True)
def _pair(x):  # type: ignore[no-untyped-def]
    return new_rows(1, 2, x), 1


@kernel()
def _is_given(x):  # type: ignore[no-untyped-def]
    return new_rows(1, 2, x).shape[0]


@kernel()
def _is_given_a_pair(x):  # type: ignore[no-untyped-def]
    return _pair(x)[1]


@kernel(allocates=True)
def _asks_a_part_that_counts_nothing(x):  # type: ignore[no-untyped-def]
    return _views(x.copy())[1]


@kernel()
def _returns(x):  # type: ignore[no-untyped-def]
    return x


@pytest.mark.parametrize("wrong", [_is_given, _is_given_a_pair, _asks_a_part_that_counts_nothing, _returns])
def test_no_array_comes_out_of_what_counts_no_references(wrong: Callable[[Any], Any]) -> None:
    with pytest.raises((TypeError, NumbaError), match="has to say that it allocates"):
        wrong(np.zeros(3, np.float32))


def test_what_says_so_may_be_given_arrays() -> None:
    @kernel(allocates=True)
    def given(x):  # type: ignore[no-untyped-def]
        return new_rows(1, 2, x).shape[1] + _pair(x)[1]

    assert given(np.zeros(3, np.float32)) == 3
