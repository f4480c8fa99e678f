"""Triton source of a neuron: its program, written out as a step, an adjoint, and the scans over all steps.

A generated module holds straight code on named blocks. Nothing in it is interpreted while it compiles, so that every
Triton that knows ``tl.load`` compiles it, and a reader sees the neuron. ``snn-sparse doctor --kernel`` prints one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from keyword import iskeyword
from textwrap import indent
from typing import NamedTuple

from ..core.programs import Op, Program

_FUNCTIONS = {
    "add": "{a} + {b}",
    "sub": "{a} - {b}",
    "mul": "{a} * {b}",
    "div": "divide({a}, {b})",
    "neg": "-{a}",
    "exp": "tl.exp({a})",
    "log": "tl.log({a})",
    "relu": "tl.where({a} <= 0, tl.zeros_like({a}), {a})",
    "abs": "tl.abs({a})",
    "spike": "({a} > 0).to({a}.dtype)",
    "above": "({a} > 0).to({a}.dtype)",
    "detach": "{a}",
    "copy": "{a}",
}

# what an operation sends to its first and its second operand, for the adjoint g of its result o
_TO_FIRST = {
    "add": "{g}",
    "sub": "{g}",
    "mul": "{g} * {b}",
    "div": "divide({g}, {b})",
    "neg": "-{g}",
    "exp": "{g} * {o}",
    "log": "divide({g}, {a})",
    "relu": "tl.where({a} > 0, {g}, tl.zeros_like({g}))",
    "abs": "tl.where({a} > 0, {g}, tl.where({a} < 0, -{g}, tl.zeros_like({g})))",
    "spike": "{g} * slope({a}, everywhere, WINDOW, KIND, P0, P1)",
    "copy": "{g}",
}
_TO_SECOND = {"add": "{g}", "sub": "-{g}", "mul": "{g} * {a}", "div": "-divide({g} * {o}, {b})"}

# what kernels have variables of their own for
_TAKEN = frozenset(
    """
    tl triton T B N WINDOW KIND P0 P1 BLOCK TILE WORDS b first cols mask rows row stride start full t j k g h chunk
    chunks chunk_rows checkpoint_rows groups begin steps back zero near least everywhere site s active bits
    odd paired gs gm g_s gs_step gm_step n_words x_stride divide slope step adjoint forward backward at end count
    tile inside left last sample weight width all_back some_back store_bits
    """.split()  # noqa: SIM905, one to a line is a page
)
_MADE = re.compile(r"(g|d|nu|sum|live|gs|gm)_.*|[rcgdn]\d+|_.*|.*_(ptr|stride|at\d+|\d+)")


class Neuron(NamedTuple):
    """What kernels are generated for."""

    program: Program
    membrane: int  # which state ``mem`` records
    rows: tuple[int, ...]  # of the packed parameters: where each of the program's is


class Names:
    """The variables of a program: its own names where no kernel has one like it, ``r7`` for register 7."""

    def __init__(self, program: Program, recurrent: bool) -> None:
        rec = ("rec",) if len(program.inputs) == 1 else tuple(f"rec_{name}" for name in program.inputs)
        names = [*program.states, *program.inputs, *rec, *program.params]
        free = [
            f"n{k}" if n in _TAKEN or _MADE.fullmatch(n) or iskeyword(n) else n for k, n in enumerate(names)
        ]
        K, C = len(program.states), len(program.inputs)
        self.states, self.inputs, rec = (
            tuple(free[:K]),
            tuple(free[K : K + C]),
            tuple(free[K + C : K + 2 * C]),
        )
        self.rec = rec if recurrent else ()
        self.params = tuple(free[K + 2 * C :])
        self.constants = tuple(f"c{k}" for k in range(len(program.constants)))
        leaves = (*self.states, *self.inputs, *rec, *self.params, *self.constants)
        self.of = dict(enumerate(leaves)) | {op.out: f"r{op.out}" for op in program.ops}
        self.arguments = (*self.states, *self.inputs, *self.rec, *self.params)


def _without_absent(program: Program, recurrent: bool) -> list[Op]:
    """Without a recurrence nothing is added to the input, not even a zero."""
    absent = range(program.first_recurrent, program.first_param)
    found = []
    for op in program.ops:
        if not recurrent and op.kind == "add" and op.b in absent:
            op = Op("copy", op.out, op.a, op.a)
        elif not recurrent and op.kind == "add" and op.a in absent:
            op = Op("copy", op.out, op.b, op.b)
        found.append(op)
    return found


def _registers(program: Program, names: Names, ops: Sequence[Op]) -> list[str]:
    constants = zip(names.constants, program.constants, strict=True)
    return [
        *(constant(name, value, names.states[0]) for name, value in constants),
        *operations(ops, names.of),
    ]


def constant(name: str, value: float, like: str) -> str:
    """A number as a block of the dtype of another one: a bare one would be float32."""
    return f"{name} = tl.full({like}.shape, {value!r}, {like}.dtype)"


def operations(ops: Iterable[Op], of: Mapping[int, str]) -> list[str]:
    """A line for each, on the variables ``of`` the registers."""
    return [f"{of[out]} = " + _FUNCTIONS[kind].format(a=of[a], b=of[b]) for kind, out, a, b in ops]


def _function(name: str, arguments: Sequence[str], lines: Sequence[str], doc: str) -> str:
    body = "\n".join([f'"""{doc}"""', *lines])
    return f"@triton.jit\ndef {name}({', '.join(arguments)}):\n{indent(body, '    ')}\n"


def step_source(program: Program, recurrent: bool) -> str:
    """The function ``step``: states, currents and parameters -> (site, spikes,) next states."""
    names = Names(program, recurrent)
    results = [names.of[k] for k in program.results]
    if program.spikes is not None:
        assert program.site is not None
        results = [names.of[program.site], names.of[program.spikes], *results]
    lines = [*_registers(program, names, _without_absent(program, recurrent)), f"return {', '.join(results)}"]
    what = (
        "the states after it"
        if program.spikes is None
        else "what fires above 0, the spikes, the states after it"
    )
    return _function("step", names.arguments, lines, f"One step: {what}.")


def adjoint_source(program: Program, recurrent: bool, params_grad: bool) -> str:
    """The function ``adjoint``: gradients of the next states and the spikes -> of currents, states (and parameters)."""
    names = Names(program, recurrent)
    ops = _without_absent(program, recurrent)
    sums: dict[int, list[str]] = {}
    arriving = [f"g_{name}" for name in names.states]
    for register, g in zip(program.results, arriving, strict=True):
        sums.setdefault(register, []).append(g)
    if program.spikes is not None:
        sums.setdefault(program.spikes, []).append("g_s")
    lines = _registers(program, names, ops)
    passes = dict(zip((op.out for op in ops), program.passes(params_grad), strict=True))
    for kind, out, a, b in reversed(ops):
        parts = sums.get(out)
        if not parts:
            continue
        to_a, to_b = passes[out]
        to_b = to_b and kind in _TO_SECOND
        if kind == "copy":  # of a sum without its recurrent part, too
            to_a, to_b = to_a or to_b or any(passes[out]), False
        if not (to_a or to_b):
            continue
        lines.append(f"g{out} = {' + '.join(parts)}")
        values = {"g": f"g{out}", "a": names.of[a], "b": names.of[b], "o": names.of[out]}
        if to_a:
            sums.setdefault(a, []).append(_TO_FIRST[kind].format(**values))
        if to_b:
            sums.setdefault(b, []).append(_TO_SECOND[kind].format(**values))
    states = len(program.states)
    wanted = [*range(states, program.first_recurrent), *range(states)]
    if params_grad:
        wanted += range(program.first_param, program.first_param + len(program.params))
    results = []
    for k in wanted:
        parts = sums.get(k)
        results.append(f"d_{names.of[k]}")
        lines.append(
            f"d_{names.of[k]} = " + (" + ".join(parts) if parts else f"tl.zeros_like({names.states[0]})")
        )
    lines.append(f"return {', '.join(results)}")
    spikes = ["g_s"] if program.spikes is not None else []
    window = ["everywhere", *(f"{name}: tl.constexpr" for name in ("WINDOW", "KIND", "P0", "P1"))]
    arguments = [*arriving, *spikes, *names.arguments, *window]
    doc = "Transpose of the step: what the gradients of its results are for its currents, states"
    return _function("adjoint", arguments, lines, doc + (" and parameters." if params_grad else "."))


def unrolled(program: Program, element_size: int) -> int:
    """How many steps a thread holds in registers: as many loads are under way before the first is used."""
    held = (len(program.states) + len(program.inputs) + 1) * (element_size // 4)
    # more would be faster still for small layers, but Triton takes time with the square of it
    return 16 if held <= 4 else 8 if held <= 6 else 4
