"""What the kernels for neurons given by equations are compiled for."""

from __future__ import annotations

from functools import cache
from typing import Any

from ..core.equations import Equations
from ..core.programs import Program


@cache
def encoded(program: Program, params_grad: bool) -> tuple[tuple, tuple]:
    """The program for ``execute`` and, register by register from the last, its uses for ``execute_back``."""
    uses: dict[int, list[tuple]] = {}
    last = program.registers - 1
    for (kind, out, a, b), flags in zip(program.ops, program.passes(params_grad), strict=True):
        for second, (register, wanted) in enumerate(zip((a, b), flags, strict=True)):
            if wanted:
                uses.setdefault(register, []).append((kind, bool(second), last - out, a, b, out))
    backward = tuple(
        (
            tuple(k for k, result in enumerate(program.results) if result == register),
            register == program.spikes,
            tuple(uses.get(register, ())),
        )
        for register in range(last, -1, -1)
    )
    return tuple((kind, a, b) for kind, _, a, b in program.ops), backward


def _common(equations: Equations, ops: tuple) -> dict[str, Any]:
    program = equations.program
    return {
        "PROGRAM": ops,
        "CONSTANTS": program.constants,
        "RESULTS": program.results,
        "STATES": len(program.states),
        "INPUTS": len(program.inputs),
        "PARAMS": len(program.params),
        "MEMBRANE": program.states.index(equations.membrane),
    }


def forward_constants(equations: Equations) -> dict[str, Any]:
    """For ``program_forward``."""
    program = equations.program
    ops, _ = encoded(program, False)
    return {**_common(equations, ops), "SPIKES": program.spikes, "SITE": program.site}


def backward_constants(equations: Equations, params_grad: bool) -> dict[str, Any]:
    """For ``program_backward``."""
    program = equations.program
    last, states = program.registers - 1, len(program.states)
    ops, uses = encoded(program, params_grad)
    return {
        **_common(equations, ops),
        "BACKWARD": uses,
        "FROM_STATES": tuple(last - k for k in range(states)),
        "FROM_INPUTS": tuple(last - k for k in range(states, program.first_recurrent)),
        "FROM_PARAMS": tuple(last - program.first_param - k for k in range(len(program.params))),
        "SPIKING": program.spikes is not None,
    }
