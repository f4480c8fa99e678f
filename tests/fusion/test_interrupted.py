"""Several threads, finalizers and signal handlers, and blocks that end in another order than they began."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snn_sparse_plugin as ssp
from snn_sparse_plugin.core.config import active_config
from snn_sparse_plugin.fusion.governor import backoff

snn = pytest.importorskip("snntorch")

STEPS = 14  # enough to be recorded: in the middle of a step of upstream's own nobody may call the same neuron


class Net:
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.layer, self.neuron = nn.Linear(20, 16), snn.Leaky(beta=0.9)
        self.x = (torch.rand(STEPS, 4, 20) < 0.5).float()

    def steps(self) -> tuple[list[Tensor], Tensor, Tensor]:
        mem, out, total = torch.zeros(4, 16), [], 0
        for x in self.x:
            spikes, mem = self.neuron(self.layer(x), mem)
            out.append(spikes)
            total = total + spikes
        return out, total, mem  # type: ignore[return-value]

    def run(self, block: Any) -> list[Tensor]:
        with block:
            out, total, mem = self.steps()
            return [torch.stack(out), total, mem]


def test_threads_that_read_one_record() -> None:
    for _ in range(10):
        net, failed = Net(0), []
        want = net.run(contextlib.nullcontext())
        gate = threading.Barrier(4)
        with ssp.sparse_mode():
            out, total, mem = net.steps()
            stacked = torch.stack(out)

            def read(i: int, given: Any, gate: Any = gate, failed: Any = failed, want: Any = want) -> None:
                gate.wait()
                try:
                    assert torch.equal(given[i % 3].detach(), want[i % 3].detach())
                except Exception as error:
                    failed.append(error)

            threads = [threading.Thread(target=read, args=(i, [stacked, total, mem])) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not failed


def test_blocks_that_end_in_the_order_they_began() -> None:
    def block() -> Iterator[None]:
        with ssp.sparse_mode():
            yield

    first, second = block(), block()
    next(first), next(second)
    next(first, None)
    assert active_config() is not None
    next(second, None)
    assert active_config() is None
    # in a third one, the options are its own
    third, fourth = block(), block()
    next(third)
    with ssp.sparse_mode(backprop_threshold=None):
        next(third, None)
        next(fourth)
        assert active_config().backprop_threshold is None  # type: ignore[union-attr]
    next(fourth, None)
    assert active_config() is None


def test_a_log_of_activity_ends_with_its_own_block() -> None:
    net = Net(0)

    def logged(logs: list[Any]) -> Iterator[None]:
        with ssp.record_activity(net.neuron) as log:
            logs.append(log)
            yield

    logs: list[Any] = []
    first, second = logged(logs), logged(logs)
    next(first), next(second)
    next(first, None)
    net.run(ssp.sparse_mode())
    next(second, None)
    assert [len(log[""]) for log in logs] == [0, 1]


class Interrupts:
    """Calls ``act`` once, before the ``at``-th line that this package runs for time fusion."""

    def __init__(self, act: Any, at: int) -> None:
        self.act, self.at, self.lines = act, at, 0

    def __enter__(self) -> Interrupts:
        self.before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        return self._line if "/fusion/" in name and "tests" not in name else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                try:
                    self.act()
                finally:
                    sys.settrace(self._call)
        return self._line


def check(act: str, every: int) -> None:
    outer, other = Net(0), Net(1)
    want, others = outer.run(contextlib.nullcontext()), other.run(contextlib.nullcontext())
    for _ in range(3):  # what is compiled and asked once
        outer.run(ssp.sparse_mode()), other.run(ssp.sparse_mode())
    kept: list[Any] = []
    acts = {
        "another loop": lambda: kept.append(other.run(ssp.sparse_mode())),
        "the same loop": lambda: outer.run(ssp.sparse_mode()),
        "a loop left recorded": lambda: kept.append(other.steps()),
        "a loop without an end": lambda: other.steps(),
    }
    with Interrupts(None, -1) as counted:
        outer.run(ssp.sparse_mode())
    assert counted.lines > 500
    for at in range(1, counted.lines, every):
        backoff.clear()  # what was interrupted may be stepped for a while: see STEPS
        with Interrupts(acts[act], at):
            got = outer.run(ssp.sparse_mode())
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), f"line {at}"
        for spikes, *rest in kept:
            spikes = torch.stack(spikes) if isinstance(spikes, list) else spikes
            for a, b in zip([spikes, *rest], others, strict=True):
                assert torch.equal(a.detach(), b), f"line {at}"
        kept.clear()


ACTS = ["another loop", "the same loop", "a loop left recorded", "a loop without an end"]


@pytest.mark.parametrize("act", ACTS)
def test_sparse_code_between_two_lines(act: str) -> None:
    """As a finalizer or a signal handler may run it."""
    check(act, 41)


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
def test_sparse_code_between_any_two_lines(act: str) -> None:
    check(act, 1)
