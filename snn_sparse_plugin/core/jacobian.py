"""Local derivatives of a neuron's equations, as further operations on the registers of its program.

Reverse mode with symbols in place of numbers: zeros and ones fold away, and the few products that depend on
the state are left. The surrogate's derivative at each spike is an input: it is not derived here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .programs import BINARY, UNARY_TORCH, Op, Program


class Derivatives(NamedTuple):
    """What is computed after a program's own operations.

    Entries are derivatives by (row, column): row 0 is the output, column 0 the current, ``1 + k`` state k of the
    program. Those that are zero, and states that the output never comes to depend on, are left out.
    """

    sites: tuple[
        tuple[int, int], ...
    ]  # the argument of a spike, and the register of the surrogate's derivative
    ops: tuple[Op, ...]
    constants: tuple[float, ...]  # in the registers after those of the program
    registers: int  # of the program and of its derivatives
    numbers: dict[tuple[int, int], float]  # entries that are known
    varying: dict[tuple[int, int], int]  # registers of those that depend on state or current
    fixed: dict[tuple[int, int], int]  # registers of those that depend on parameters alone


@cache
def derivatives_of(program: Program, output: int) -> Derivatives:
    """The derivatives of register ``output`` and of the next states by current and states."""
    builder = _Builder(program)
    columns = [len(program.states), *range(len(program.states))]  # the register of x comes after the states'
    rows = [output, *program.results]
    entries: dict[tuple[int, int], _Value] = {}
    for r, result in enumerate(rows):
        found = builder.row(result)
        for c, register in enumerate(columns):
            if (value := found.get(register, 0.0)) != 0.0:
                entries[r, c] = value
    wanted = _reached(entries) | {0}
    # where the spikes are a state, what they were does not matter
    wanted -= {r for r, result in enumerate(rows) if r and result == output == program.spikes}
    return builder.finished({place: v for place, v in entries.items() if wanted.issuperset(place)})


def fixed_values(program: Program, found: Derivatives, params: Tensor) -> dict[tuple[int, int], Tensor]:
    """The entries that depend on parameters (P, N) alone, (N,) each."""
    values = {program.first_param + k: row for k, row in enumerate(params)}
    constants = [(program.first_param + len(params), program.constants), (program.registers, found.constants)]
    for first, numbers in constants:
        values |= {first + k: params.new_tensor(number) for k, number in enumerate(numbers)}
    for kind, out, a, b in (*program.ops, *found.ops):
        if a in values and b in values:
            p, q = values[a], values[b]
            values[out] = getattr(torch, kind)(p, q) if kind in BINARY else UNARY_TORCH[kind](p)
    return {pair: values[k].expand(params.shape[1]) for pair, k in found.fixed.items()}


def _reached(entries: Iterable[tuple[int, int]]) -> set[int]:
    """The states that the output depends on, at once or in a later step."""
    found = {0}
    while more := {c for r, c in entries if r in found} - found:
        found |= more
    return found


class _Made(NamedTuple):
    """A register: ``of`` the program, or made after it, the k-th."""

    of: str
    k: int


_Value = float | _Made


class _Builder:
    def __init__(self, program: Program) -> None:
        self.program = program
        first = program.first_param + len(program.params)
        self.constants = {first + k: float(value) for k, value in enumerate(program.constants)}
        self.made: dict[tuple[str, _Value, _Value], _Made] = {}

    def row(self, result: int) -> dict[int, _Value]:
        """The derivatives of a register by every one that no operation makes."""
        adjoint: dict[int, _Value] = {result: 1.0}

        def send(register: int, value: _Value) -> None:
            adjoint[register] = self.add(adjoint.get(register, 0.0), value)

        for kind, out, a, b in reversed(self.program.ops):
            g = adjoint.pop(out, 0.0)
            if g == 0.0:
                continue
            if kind in ("add", "sub"):
                send(a, g)
                send(b, g if kind == "add" else self.neg(g))
            elif kind == "mul":
                send(a, self.mul(g, self.read(b)))
                send(b, self.mul(g, self.read(a)))
            elif kind == "div":
                send(a, self.div(g, self.read(b)))
                send(b, self.neg(self.div(self.mul(g, self.read(out)), self.read(b))))
            elif kind == "neg":
                send(a, self.neg(g))
            elif kind == "exp":
                send(a, self.mul(g, self.read(out)))
            elif kind == "log":
                send(a, self.div(g, self.read(a)))
            elif kind == "relu":
                send(a, self.mul(g, self.emit("above", self.read(a))))
            elif kind == "abs":
                x = self.read(a)
                sign = self.emit("sub", self.emit("above", x), self.emit("above", self.neg(x)))
                send(a, self.mul(g, sign))
            elif kind == "spike":
                send(a, self.mul(g, self.emit("phi", self.read(a))))
            elif kind == "copy":
                send(a, g)
        return adjoint

    def read(self, register: int) -> _Value:
        return self.constants.get(register, _Made("program", register))

    def add(self, x: _Value, y: _Value) -> _Value:
        if isinstance(x, float) and isinstance(y, float):
            return x + y
        return y if x == 0.0 else x if y == 0.0 else self.emit("add", x, y)

    def neg(self, x: _Value) -> _Value:
        return -x if isinstance(x, float) else self.emit("neg", x)

    def mul(self, x: _Value, y: _Value) -> _Value:
        if isinstance(x, float) and isinstance(y, float):
            return x * y
        for number, other in ((x, y), (y, x)):
            if number in (0.0, 1.0, -1.0):
                return 0.0 if number == 0.0 else other if number == 1.0 else self.neg(other)
        return self.emit("mul", x, y)

    def div(self, x: _Value, y: _Value) -> _Value:
        if isinstance(x, float) and isinstance(y, float):
            return x / y
        return x if y == 1.0 or x == 0.0 else self.emit("div", x, y)

    def emit(self, kind: str, a: _Value, b: _Value | None = None) -> _Made:
        key = (kind, a, a if b is None else b)
        return self.made.setdefault(key, _Made("after", len(self.made)))

    def finished(self, entries: dict[tuple[int, int], _Value]) -> Derivatives:
        """With registers after the program's: constants, surrogates, and the operations that an entry needs."""
        live = {v for v in entries.values() if isinstance(v, _Made)}
        needed = []
        for (kind, a, b), out in reversed(self.made.items()):
            if out in live:
                live |= {x for x in (a, b) if isinstance(x, _Made)}
                needed.append((kind, out, a, b))
        # surrogates look at the program's registers alone, so they come first
        needed.reverse()
        needed.sort(key=lambda op: op[0] != "phi")
        constants = dict.fromkeys(x for _, _, a, b in needed for x in (a, b) if isinstance(x, float))
        start = self.program.registers
        place: dict[_Value, int] = {x: start + k for k, x in enumerate(constants)}
        place |= {out: start + len(constants) + k for k, (_, out, _, _) in enumerate(needed)}

        def at(x: _Value) -> int:
            return x.k if isinstance(x, _Made) and x.of == "program" else place[x]

        ops = tuple(Op(kind, at(out), at(a), at(b)) for kind, out, a, b in needed if kind != "phi")
        unvaried = self._unvaried(ops, range(start, start + len(constants)))
        registers = {pair: at(v) for pair, v in entries.items() if isinstance(v, _Made)}
        return Derivatives(
            tuple((at(a), at(out)) for kind, out, a, _ in needed if kind == "phi"),
            ops,
            tuple(constants),
            start + len(place),
            {pair: v for pair, v in entries.items() if isinstance(v, float)},
            {pair: k for pair, k in registers.items() if k not in unvaried},
            {pair: k for pair, k in registers.items() if k in unvaried},
        )

    def _unvaried(self, ops: Iterable[Op], constants: Iterable[int]) -> set[int]:
        """Registers that are the same at every step."""
        program = self.program
        found = {*range(program.first_param, program.registers - len(program.ops)), *constants}
        for _, out, a, b in (*program.ops, *ops):
            if {a, b} <= found:
                found.add(out)
        return found
