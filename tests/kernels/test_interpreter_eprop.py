"""E-prop's learner in the interpreter, whose tensors are taken for those of a device: gradients, reads, launches."""

import os
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton.language", reason="the triton extra is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in the environment", allow_module_level=True)

from eprop_cases import build, inputs, loop, loss_of
from eprop_run_cases import EPropTests
from no_host_reads import READS, NoHostReads, no_host_reads, notice_launches
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from snn_sparse_plugin.core import host
from snn_sparse_plugin.learners import eprop
from snn_sparse_plugin.learners.eprop.blocks import Totals

pytestmark = pytest.mark.triton_interpreter


@contextmanager
def on_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "HOSTS", frozenset())
        yield


class TestInterpreter(EPropTests):
    device = "cpu"

    def on_device(self):
        return on_device()


@pytest.fixture
def launched(monkeypatch):
    """How often each kernel was launched."""
    names = Counter()
    launch = interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        names[self.fn.__name__] += 1
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return names


OPTIONS = [
    {},
    {"engine": "offline"},
    {"rate_reg": eprop.FiringRate(c=0.5, target_hz=50, tau=20)},
    {"feedback": "random"},
    {"update": "chunk"},
]


@pytest.mark.parametrize(
    ("name", "options"), [*(("lsnn", options) for options in OPTIONS), ("lsnn-two-layers", {})], ids=str
)
def test_a_chunk_reads_nothing(monkeypatch, name, options):
    net, x = build(name, torch.float32), inputs(T=6, dtype=torch.float32)
    with on_device(), eprop.EProp(net, chunk=3, **options) as learner:
        learner.run(x, lambda y, _: loss_of(y))  # as before a capture
        learner.reset()
        network, totals = learner.compile(), Totals(lambda y, _: loss_of(y), False)
        state = None
        for block in (x[:3], x[3:]):
            with no_host_reads(monkeypatch):
                given, K = network.take(block, state)
                learner.check_versions()
                network.learn(given, K, lambda t: None, totals)
                state = network.state()
                learner.deliver()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


STEPPED = [
    *(("lsnn", options) for options in OPTIONS),
    *((name, {}) for name in ("leaky-subtract", "leaky-beta-per-neuron", "rleaky", "norse-lsnn-recurrent")),
    ("leaky-zero", {"engine": "offline"}),
]


@pytest.mark.parametrize(("name", "options"), STEPPED, ids=str)
def test_a_step_reads_nothing(monkeypatch, name, options):
    net, x = build(name, torch.float32), inputs(T=6, dtype=torch.float32)
    with on_device(), eprop.EProp(net, **{"chunk": 2, **options}) as learner:
        loop(net, x, learner.step)
        learner.flush()
        learner.reset()
        _, state = loop(net, x[:1], learner.step)
        with no_host_reads(monkeypatch):
            loop(net, x[1:], learner.step, state)
            learner.flush()


class Reads(TorchDispatchMode):
    """Counts what waits for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in READS and not NoHostReads.launching
        return func(*args, **(kwargs or {}))


def test_a_run_reads_at_its_end_alone(monkeypatch):
    notice_launches(monkeypatch)
    net, x = build("lsnn-two-layers", torch.float32), inputs(T=9, dtype=torch.float32)
    with on_device(), eprop.EProp(net, chunk=3) as learner:
        for T in (3, 9):
            learner.run(x[:T], lambda y, _: loss_of(y))
            with Reads() as reads:
                learner.run(x[:T], lambda y, _: loss_of(y))
            assert reads.count == 3  # the loss, and the spikes of each of two layers


def test_one_kernel_a_chunk_for_the_steps_the_scan_and_each_weight(launched):
    net, x = build("lsnn", torch.float32), inputs(T=6, dtype=torch.float32)
    with on_device(), eprop.EProp(net, chunk=2) as learner:
        learner.run(x, lambda y, _: loss_of(y))
    assert (launched["chunk"], launched["scan"], launched["sum_and_carry"]) == (3, 3, 6)
    assert launched["leaky"] == 6  # outputs, and their errors
