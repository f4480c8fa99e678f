"""What the sources of both scans are written with, statement by statement; :mod:`.generate` has a neuron's step."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import indent

from .generate import Names, Neuron

SIZES = ["T", "B", "N"]
FED_BACK = ["rec_weight_t_ptr", "rec_bias_ptr", "rec0_ptr"]


class Writer:
    """The names of a neuron, and how they are loaded, stored and stepped."""

    def __init__(self, neuron: Neuron, recurrent: bool, params_grad: bool = False) -> None:
        program = self.program = neuron.program
        self.rows, self.params_grad = neuron.rows, params_grad and bool(program.params)
        self.names = Names(program, recurrent)
        self.states, self.inputs, self.params = self.names.states, self.names.inputs, self.names.params
        self.membrane = self.states[neuron.membrane]
        self.spiking = program.spikes is not None
        self.C = len(self.inputs)

    def _places(self) -> str:
        lines = [
            "b = tl.program_id(0).to(tl.int64)",
            "first = tl.program_id(1) * BLOCK",
            "cols = first + tl.arange(0, BLOCK)",
            "mask = cols < N",
            "rows = B.to(tl.int64)  # of a step: T * B * N may pass 2^31",
            "stride = x_stride.to(tl.int64)",
            f"x_ptr += b * {times(self.C, 'N')}",
        ]
        for row, name in zip(self.rows, self.params, strict=True):
            lines.append(f"{name} = tl.load(params_ptr + {times(row, 'N')} + cols, mask=mask, other=1.0)")
        return "\n".join(lines)

    def _load_states(self, pointer: str, row: str, made: str = "{}") -> str:
        """``pointer`` and ``made`` name the states' pointers and what is loaded from them."""
        return "\n".join(
            f"{made.format(name)} = tl.load({pointer.format(name)}_ptr + ({row}) * N + cols, mask=mask, other=0.0)"
            for name in self.states
        )

    def _store_states(self, pointer: str, row: str, value: str = "{}") -> str:
        return "\n".join(
            f"tl.store({pointer.format(name)}_ptr + ({row}) * N + cols, {value.format(name)}, mask=mask)"
            for name in self.states
        )

    def _load(self, at: str, mask: str) -> str:
        """Numbers that may be stored in half precision, as the state's dtype."""
        return f"tl.load({at}, mask={mask}, other=0.0).to({self.states[0]}.dtype)"

    def _load_inputs(self, t: str, mask: str, suffix: str = "") -> list[str]:
        at = "x_ptr + ({t}) * stride + {column} + cols"
        return [
            f"{name}{suffix} = {self._load(at.format(t=t, column=times(c, 'N')), mask)}"
            for c, name in enumerate(self.inputs)
        ]

    def _step(self, *, inputs: str = "", keep: bool = True) -> str:
        """``site, s, states = step(states, currents, parameters)``."""
        made = (["site", "s"] if keep else ["_site", "_s"]) if self.spiking else []
        currents = (f"{x}{inputs}" for x in (*self.inputs, *self.names.rec))
        given = [*self.states, *currents, *self.params]
        return f"{', '.join([*made, *self.states])} = step({', '.join(given)})"

    def _pointers(self, *kinds: str) -> list[str]:
        return [f"{kind.format(name)}_ptr" for kind in kinds for name in self.states]

    def _recurrent_currents(self, t: str, row: str) -> list[str]:
        return [
            f"{name} = recurrent_current({t}, rec_weight_t_ptr, rec_bias_ptr, rec0_ptr, words_ptr, {row}, b, rows, "
            f"n_words, {times(self.C, 'N')}, {times(c, 'N')} + cols, mask, {self.states[0]})"
            for c, name in enumerate(self.names.rec)
        ]


def times(count: int, unit: str) -> str:
    return unit if count == 1 else f"{count} * {unit}"


def indented(lines: Sequence[str]) -> list[str]:
    return ["    " + line for statement in lines for line in statement.split("\n")]


def kernel(name: str, free: Sequence[str], arguments: Sequence[str], body: Sequence[str], doc: str) -> str:
    head = f"@triton.jit(do_not_specialize={list(free)!r})\ndef {name}(\n    " + ",\n    ".join(arguments)
    return f'{head},\n):\n    """{doc}"""\n' + indent("\n".join(body), "    ") + "\n"
