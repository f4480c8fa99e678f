"""Random step loops: layers, branches, feedback, resets, detaches and readings in any order give the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import snn_sparse_plugin as ssp

snntorch = pytest.importorskip("snntorch")

B, N = 3, 6
KINDS = (
    "linear",
    "leaky",
    "synaptic",
    "relu",
    "add",
    "mul",
    "cat",
    "view",
    "feedback",
    "read",
    "static",
    "drop",
    "detach",
    "total",
    "written",
)
layers = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=9
)


class Program:
    """The same operations at every step on the values made so far; ``marks`` are steps where something happens."""

    def __init__(self, ops: Any, steps: int, marks: Any, seed: int) -> None:
        torch.manual_seed(seed)
        self.ops, self.steps, self.marks, self.seed = ops, steps, marks, seed
        self.modules = nn.ModuleList([self._module(kind) for kind, _, _ in ops])
        with torch.no_grad():
            for p in self.modules.parameters():
                if p.dim():
                    p.copy_((torch.randn(p.shape) * 24).round() / 32)
        self.x = (torch.rand(steps, B, N) < 0.5).float()

    def _module(self, kind: str) -> nn.Module:
        if kind in ("linear", "feedback"):
            return nn.Linear(N, N)
        if kind == "cat":
            return nn.Linear(2 * N, N)
        if kind == "leaky":
            return snntorch.Leaky(0.875, reset_mechanism="subtract")
        return snntorch.Synaptic(0.5, 0.75) if kind == "synaptic" else nn.Identity()

    def run(self) -> tuple[list[Tensor], list[Tensor | None]]:
        torch.manual_seed(self.seed)
        self.modules.zero_grad()
        states: dict[int, Any] = {}
        before: dict[int, Tensor] = {}
        kept: list[Tensor] = []
        self.written: dict[int, Tensor] = {}
        read = 0.0
        for t in range(self.steps):
            self.t = t
            values = [self.x[t]]
            for k, ((kind, a, _), module) in enumerate(zip(self.ops, self.modules, strict=True)):
                x, y = values[a % len(values)], values[-1]
                values.append(self._value(kind, k, module, x, y, states, before))
                if kind == "read" and t in self.marks:
                    read += float(y.detach().sum())
                if kind == "detach" and t in self.marks:
                    states = {key: tuple(s.detach() for s in state) for key, state in states.items()}
            before = dict(enumerate(values))
            if t in self.marks or t % 2:
                kept.append(values[-1])
        kept.append(values[-1])
        out = torch.stack(kept)
        loss = F.mse_loss(out, torch.ones_like(out)) + sum(state[-1].mean() for state in states.values())
        loss = loss + sum((x**2).mean() for x in self.written.values())
        loss.backward() if loss.requires_grad else None
        whole = [x.detach() for x in self.written.values()]
        return [out.detach(), torch.tensor(read), loss.detach(), *whole], [
            p.grad for p in self.modules.parameters()
        ]

    def _value(
        self, kind: str, k: int, module: Any, x: Tensor, y: Tensor, states: Any, before: Any
    ) -> Tensor:
        if kind == "linear":
            return module(y)
        if kind == "leaky":
            spk, mem = module(y, *states.get(k, (torch.zeros(B, N),)))
            states[k] = (mem,)
            return spk
        if kind == "synaptic":
            spk, *state = module(y, *states.get(k, (torch.zeros(B, N), torch.zeros(B, N))))
            states[k] = tuple(state)
            return spk
        if kind == "static":
            return y + self.x[0]
        if kind == "feedback":
            return y + module(before.get(k + 1, torch.zeros(B, N)))
        if kind == "total":
            total = self.written.setdefault(k, torch.zeros(B, N))
            total += 0.25 * y
            return y if x is y else total * 0.5
        if kind == "written":
            self.written.setdefault(k, torch.zeros(self.steps, B, N))[self.t] = y
            return y
        if kind == "drop":
            return F.dropout(y, 0.25)
        simple = {
            "relu": lambda: torch.relu(y) - 0.25 * x,
            "add": lambda: y + 0.5 * x,
            "mul": lambda: y * (x > 0.25).float(),
            "cat": lambda: module(torch.cat([x, y], dim=-1)),
            "view": lambda: y.view(B, 2, -1).transpose(1, 2).reshape(B, N),
        }
        return simple.get(kind, lambda: y)()


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    layers,
    st.integers(1, 6),
    st.sets(st.integers(0, 5), max_size=3),
    st.integers(0, 9),
    st.sampled_from([None, None, 2]),
    st.booleans(),
)
def test_a_random_loop(ops: Any, steps: int, marks: Any, seed: int, max_steps: Any, window: bool) -> None:
    program = Program(ops, steps, marks, seed)
    options: dict[str, Any] = {"backprop_threshold": 0.5 if window else None, "min_active": 0}
    if window:
        with ssp.sparse_mode(fuse_time=False, **options):
            expected, grads = program.run()
    else:
        expected, grads = program.run()
    with ssp.sparse_mode(max_steps=max_steps, **options):
        found, got = program.run()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6
