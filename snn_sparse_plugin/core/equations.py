"""Neurons by their equations: a few lines of text become a program that every backend runs, forward and backward.

What :class:`~snn_sparse_plugin.core.dynamics.NeuronSpec` cannot say (a second synapse, adaptation, a refractory
counter, an exponential term) is said here, so that a new neuron needs no kernel. A program is a list of elementwise
operations on numbered registers. The reference runs it on tensors under autograd, the CPU backend on rows, with its
adjoint.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property

from .errors import ConfigError
from .programs import BINARY, Op, Program

_SYMBOLS: dict[type, str] = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}
_UNARY = ("exp", "log", "relu", "abs", "spike", "above", "detach")


@dataclass(frozen=True)
class Equations:
    """One step of a neuron, written as assignments. Static and hashable, like a ``NeuronSpec``.

    A state is known by its name: at the start of a step it holds the previous value, and what it holds at the end is
    the next one. ``x`` is the input current, ``rec`` the recurrent one (0 where there is none); every other name that
    is never assigned is a parameter. ``s`` is the output.

    A neuron with several ``inputs``, such as an excitatory and an inhibitory one, has a current of each name; the
    recurrent current of ``exc`` is then ``rec_exc``. Its weights have the rows of all inputs one after the other:
    (C·N, M) for C inputs of N neurons.

    Operators are ``+ - * /``, and the functions are ``exp``, ``log``, ``relu``, ``abs``; ``spike(y)`` is 1 where
    ``y > 0`` with the surrogate's gradient, ``above(y)`` the same without a gradient, ``detach(y)`` is y without a
    gradient. They run in the order written, so that float rounding is upstream's.

    Args:
        text: the assignments, one a line.
        states: names of what is carried from step to step.
        membrane: the state that ``return_mem`` records.
        inputs: names of the input currents.

    Raises:
        ConfigError: something that is not an equation of this kind; the message shows the line.

    Example:
        >>> lif = Equations("v = beta * v + x - above(v - threshold) * threshold\\ns = spike(v - threshold)", ("v",))
        >>> lif.program.params
        ('beta', 'threshold')
    """

    text: str
    states: tuple[str, ...]
    membrane: str = "v"
    inputs: tuple[str, ...] = ("x",)

    def __post_init__(self) -> None:
        for what, names, taken in (("inputs", self.inputs, ()), ("states", self.states, self.currents)):
            if not _are_names(names, taken):
                raise ConfigError(f"{what} must be a tuple of different names, got {names!r}.")
        if self.membrane not in self.states:
            raise ConfigError(f"membrane {self.membrane!r} is none of the states {self.states}.")
        _ = self.program  # wrong text is found here, not at the first step

    @cached_property
    def program(self) -> Program:
        return _Compiler(self).compile()

    @property
    def spiking(self) -> bool:
        return self.program.spikes is not None

    @property
    def currents(self) -> tuple[str, ...]:
        """The names of the inputs, then of their recurrent parts."""
        if len(self.inputs) == 1:
            return (*self.inputs, "rec")
        return (*self.inputs, *(f"rec_{name}" for name in self.inputs))


def _are_names(names: object, taken: tuple[str, ...]) -> bool:
    if not isinstance(names, tuple) or not names or len(set(names)) < len(names):
        return False
    known = (*taken, *_UNARY, "s", "rec")
    return all(isinstance(name, str) and name.isidentifier() and name not in known for name in names)


class _Compiler:
    """Text to registers. Equal expressions are computed once; that changes no rounding."""

    def __init__(self, equations: Equations) -> None:
        self.equations = equations
        self.lines = ast.parse(self._clean()).body
        assigned = {
            t.id
            for line in self.lines
            if isinstance(line, ast.Assign)
            for t in line.targets
            if isinstance(t, ast.Name)
        }
        names: dict[str, None] = {}
        constants: dict[float, None] = {}
        for node in (n for line in self.lines for n in _in_order(line)):
            if isinstance(node, ast.Name):
                names.setdefault(node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
                constants.setdefault(float(node.value))
        known = {*equations.states, *equations.currents, *assigned, *_UNARY}
        self.params = tuple(name for name in names if name not in known)
        self.constants = tuple(constants)
        leaves = (*equations.states, *equations.currents, *self.params)
        self.values: dict[str, int] = {name: k for k, name in enumerate(leaves)}
        self.numbers = {value: len(leaves) + k for k, value in enumerate(self.constants)}
        self.next = len(leaves) + len(self.constants)
        self.ops: dict[tuple[str, int, int], int] = {}

    def _clean(self) -> str:
        text = "\n".join(line.strip() for line in self.equations.text.strip().splitlines())
        try:
            ast.parse(text)
        except SyntaxError as error:
            raise ConfigError(f"equations do not parse: {error.text or text!r}") from error
        return text

    def compile(self) -> Program:
        for line in self.lines:
            if (
                not isinstance(line, ast.Assign)
                or len(line.targets) != 1
                or not isinstance(line.targets[0], ast.Name)
            ):
                raise self._error(line, "expected an assignment, name = expression")
            name = line.targets[0].id
            if name in self.equations.currents or name in _UNARY:
                raise self._error(line, f"{name!r} cannot be assigned")
            self.values[name] = self._expression(line.value)
        self._check_inputs()
        for k, name in enumerate(self.equations.states):
            # the value of another state is copied first: all states advance at once
            if self.values[name] < len(self.equations.states) and self.values[name] != k:
                self.values[name] = self._emit("copy", self.values[name])
        if "s" in self.values and not self._is_binary(self.values["s"]):
            raise ConfigError("s must be 0 or 1: a spike(...), or a product of spikes and of 1 - spike(...).")
        wanted = [self.values[name] for name in self.equations.states]
        if "s" in self.values:
            wanted.append(self.values["s"])
        place = self._live(wanted)
        ops = tuple(
            Op(kind, place[out], place[a], place[b]) for (kind, a, b), out in self.ops.items() if out in place
        )
        sites = [op.a for op in ops if op.kind == "spike"]
        fires = any(kind == "spike" for kind, _, _ in self.ops)
        if not ("s" in self.values) == fires == bool(sites):
            raise ConfigError("a neuron that spikes assigns s, from spike(...); a readout has neither.")
        results = [place[register] for register in wanted]
        count = len(self.equations.states)
        return Program(
            ops,
            self.equations.states,
            self.equations.inputs,
            self.params,
            self.constants,
            tuple(results[:count]),
            results[count] if sites else None,
            sites[0] if sites else None,
        )

    def _live(self, wanted: list[int]) -> dict[int, int]:
        """New numbers for the registers without those that nothing reads."""
        live = set(wanted)
        for (_, a, b), out in reversed(self.ops.items()):
            if out in live:
                live |= {a, b}
        leaves = self.next - len(self.ops)
        kept = [*range(leaves), *(out for out in self.ops.values() if out in live)]
        return {register: k for k, register in enumerate(kept)}

    def _expression(self, node: ast.expr) -> int:
        if isinstance(node, ast.Name):
            if node.id not in self.values:
                raise self._error(node, f"{node.id!r} is used before it is assigned")
            return self.values[node.id]
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return self.numbers[float(node.value)]
        if isinstance(node, ast.BinOp) and type(node.op) in _SYMBOLS:
            return self._emit(
                _SYMBOLS[type(node.op)], self._expression(node.left), self._expression(node.right)
            )
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return self._emit("neg", self._expression(node.operand))
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in _UNARY
            and len(node.args) == 1
            and not node.keywords
        ):
            return self._emit(node.func.id, self._expression(node.args[0]))
        raise self._error(node, f"only + - * / and {', '.join(_UNARY)} are known")

    def _emit(self, kind: str, a: int, b: int | None = None) -> int:
        key = (kind, a, a if b is None else b)
        if key not in self.ops:
            self.ops[key] = self.next
            self.next += 1
        return self.ops[key]

    def _is_binary(self, register: int) -> bool:
        """Whether a register is 0 or 1 by construction: what may leave as events."""
        kind, a, b = next((key for key, out in self.ops.items() if out == register), ("", -1, -1))
        if kind in ("spike", "above"):
            return True
        if kind in ("detach", "copy"):
            return self._is_binary(a)
        if kind == "sub":
            return a == self.numbers.get(1.0) and self._is_binary(b)
        return kind == "mul" and self._is_binary(a) and self._is_binary(b)

    def _check_inputs(self) -> None:
        # one gradient, dE/dx, then serves the input and the recurrent weights alike
        names, count = self.equations.currents, len(self.equations.inputs)
        pairs = list(zip(names[:count], names[count:], strict=True))
        if any(self._readers(self.values[rec]) for _, rec in pairs):
            for x, rec in pairs:
                if not self._joined(self.values[x], self.values[rec]):
                    raise ConfigError(
                        f"{x} and {rec} must each be used once, one right after the other: `... + {x} + {rec}`."
                    )

    def _joined(self, x: int, rec: int) -> bool:
        """Whether both are used once, in a sum."""
        of_rec, of_x = self._readers(rec), self._readers(x)
        if len(of_rec) == 1 and of_rec[0][0] == "add" and of_rec[0][2] == rec:
            total = of_rec[0][1]  # x itself, or a sum whose only use of x is this one
            of_total = self._readers(total)
            kept = {self.values[name] for name in self.equations.states} & {x, rec, total}
            made = next((key for key, out in self.ops.items() if out == total), None)
            joined = total == x or (made is not None and made[0] == "add" and of_x == [made])
            return len(of_total) == 1 and not kept and joined
        return False

    def _readers(self, register: int) -> list[tuple[str, int, int]]:
        """The ops that read a register, once for every time they do."""
        return [key for key in self.ops for k in (key[1:] if key[0] in BINARY else key[1:2]) if k == register]

    def _error(self, node: ast.stmt | ast.expr, what: str) -> ConfigError:
        return ConfigError(f"equations: {what}, in: {ast.unparse(node)}")


def _in_order(node: ast.AST) -> list[ast.AST]:
    """The nodes in the order they are written, without the names of functions and targets."""
    if isinstance(node, ast.Assign):
        return _in_order(node.value)
    if isinstance(node, ast.Call):
        return [n for arg in node.args for n in _in_order(arg)]
    found = [node]
    for child in ast.iter_child_nodes(node):
        found += _in_order(child)
    return found
