"""A record does not grow with an endless loop."""

from __future__ import annotations

import resource
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snn_sparse_plugin as ssp
from snn_sparse_plugin.fusion import record
from snn_sparse_plugin.fusion.flush import flush

snn = pytest.importorskip("snntorch")

B, M, N = 8, 40, 30


@pytest.fixture(autouse=True)
def _nothing_is_recorded() -> None:
    flush()


def run(block: Any, steps: int, grad: bool) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    first, l1, second, l2 = nn.Linear(M, N), snn.Leaky(0.9), nn.Linear(N, 5), snn.Leaky(0.9)
    with block, torch.set_grad_enabled(grad):
        m1, m2, count = l1.init_leaky(), l2.init_leaky(), torch.zeros(B, 5)
        for _ in range(steps):
            spikes, m1 = l1(first((torch.rand(B, M) < 0.3).float()), m1)
            out, m2 = l2(second(spikes), m2)
            count = count + out
        if grad:
            (count.sum() + m2.sum()).backward()
        return count.detach(), [p.grad for p in (first.weight, second.weight) if p.grad is not None]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_large_record_runs_and_the_loop_goes_on(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "LARGEST_KEPT" if grad else "LARGEST", 1 << 18)
    want, grads = run(nullcontext(), 200, grad)
    record.reasons.clear()
    got, ours = run(ssp.sparse_mode(backprop_threshold=None, min_active=0), 200, grad)
    assert record.reasons["a large record"] >= 3
    assert torch.equal(got, want)
    for a, b in zip(ours, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_loop_of_common_size_runs_at_once() -> None:
    record.reasons.clear()
    run(ssp.sparse_mode(), 200, True)
    assert "a large record" not in record.reasons


def test_large_steps_are_still_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large a step is, so many of them run together."""
    monkeypatch.setattr(record, "LARGEST", 1)
    ssp.tally.clear()
    run(ssp.sparse_mode(), 200, False)
    assert 1 <= ssp.tally.by_class()["Leaky"].calls["fused"] <= 2 * 200 / record.SHORTEST


GROWTH = """
import resource, sys, torch, snntorch, snn_sparse_plugin as ssp
torch.set_num_threads(1)
B, N = 64, 400
fc1, l1, fc2, l2 = torch.nn.Linear(500, N), snntorch.Leaky(0.95), torch.nn.Linear(N, 10), snntorch.Leaky(0.95)
def peak(steps):
    with torch.no_grad(), ssp.sparse_mode():
        m1, m2, count = torch.zeros(1), torch.zeros(1), torch.zeros(B, 10)
        for _ in range(steps):
            s, m1 = l1(fc1((torch.rand(B, 500) < 0.02).float()), m1)
            s, m2 = l2(fc2(s), m2)
            count = count + s
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak(200)
print(peak(1500) - before)
"""


def test_the_memory_of_the_process_does_not_follow_the_number_of_steps() -> None:
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100, "MiB; the inputs of all steps alone take 180"
