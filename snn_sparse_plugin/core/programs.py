"""Programs: what a neuron's equations are compiled to, a list of elementwise operations on numbered registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

OPS = ("add", "sub", "mul", "div", "neg", "exp", "log", "relu", "abs", "spike", "above", "detach", "copy")
BINARY = ("add", "sub", "mul", "div")
_NO_GRADIENT = ("above", "detach")


class Op(NamedTuple):
    """``register[out] = kind(register[a], register[b])``; ``b`` is ``a`` where there is one operand."""

    kind: str
    out: int
    a: int
    b: int


class Program(NamedTuple):
    """Registers in this order: states, inputs, recurrent inputs, parameters, constants, the result of each op."""

    ops: tuple[Op, ...]
    states: tuple[str, ...]
    inputs: tuple[str, ...]
    params: tuple[str, ...]
    constants: tuple[float, ...]
    results: tuple[int, ...]  # where the next value of each state is
    spikes: int | None  # where the layer's output is
    site: int | None  # the argument of the first ``spike``: what the window and the active list look at

    @property
    def registers(self) -> int:
        return self.first_param + len(self.params) + len(self.constants) + len(self.ops)

    @property
    def first_recurrent(self) -> int:
        return len(self.states) + len(self.inputs)

    @property
    def first_param(self) -> int:
        return self.first_recurrent + len(self.inputs)

    @property
    def recurrent(self) -> bool:
        """Whether it reads the recurrent inputs."""
        return any(self.first_recurrent <= k < self.first_param for op in self.ops for k in (op.a, op.b))

    @property
    def direct(self) -> bool:
        """Whether the output is the one spike that the window applies to: only active neuron-steps get a gradient."""
        return any(op.kind == "spike" and (op.out, op.a) == (self.spikes, self.site) for op in self.ops)

    def passes(self, params_grad: bool) -> list[tuple[bool, bool]]:
        """For every op, whether a gradient goes on to its first and its second operand."""
        varies = {
            *range(self.first_recurrent)
        }  # states and inputs; a recurrent input shares the gradient of its input
        if params_grad:
            varies |= {self.first_param + k for k in range(len(self.params))}
        found = []
        for kind, out, a, b in self.ops:
            to_a = kind not in _NO_GRADIENT and a in varies
            to_b = kind in BINARY and b in varies
            if to_a or to_b:
                varies.add(out)
            found.append((to_a, to_b))
        return found


def step(
    program: Program,
    states: Mapping[str, Tensor],
    x: Tensor,
    rec: Tensor | None,
    params: Tensor,
    spike: Callable[[Tensor], Tensor],
) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
    """One step on tensors, differentiable: -> (argument of the first spike, s, next states).

    ``x`` and ``rec`` hold all inputs, (B, C·N).
    """
    numbers = [torch.tensor(c, dtype=x.dtype, device=x.device) for c in program.constants]
    count = len(program.inputs)
    currents = x.tensor_split(count, -1)
    recurrent = [None] * count if rec is None else rec.tensor_split(count, -1)
    values: list[Tensor | None] = [*states.values(), *currents, *recurrent, *params.unbind(0), *numbers]
    for kind, _, a, b in program.ops:
        p, q = values[a], values[b]
        assert p is not None
        if q is None:  # no recurrence: nothing is added, not even a zero
            values.append(p)
        elif kind in BINARY:
            values.append(getattr(torch, kind)(p, q))
        else:
            values.append(spike(p) if kind == "spike" else UNARY_TORCH[kind](p))

    def full(k: int | None) -> Tensor | None:
        value = None if k is None else values[k]
        return None if value is None else value.expand_as(currents[0])

    new = {name: full(k) for name, k in zip(program.states, program.results, strict=True)}
    return full(program.site), full(program.spikes), new  # type: ignore[return-value]


UNARY_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg,
    "exp": torch.exp,
    "log": torch.log,
    "relu": torch.relu,
    "abs": torch.abs,
    "above": lambda y: (y > 0).to(y.dtype).detach(),
    "detach": lambda y: y.detach(),
    "copy": lambda y: y,
}
