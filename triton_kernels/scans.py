"""Triton sources of a neuron's scans over all steps, as modules: its step, its adjoint, and a kernel for each way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from ..core.canonical import traced
from ..core.dynamics import PARAM_NAMES, NeuronSpec
from ..core.equations import Equations
from ..core.programs import Program
from .backward_scan import BackwardWriter
from .forward_scan import ForwardWriter
from .generate import Neuron, adjoint_source, step_source, unrolled

_HEAD = '''"""{title}. Generated; a change to it is lost."""

import triton
import triton.language as tl

from snn_sparse_plugin.triton_kernels.parts import {parts}

'''


def neuron_of(spec: NeuronSpec | Equations, recurrent: bool) -> Neuron:
    """The neuron as kernels are generated for it."""
    if isinstance(spec, Equations):
        program = spec.program
        return Neuron(program, spec.states.index(spec.membrane), tuple(range(len(program.params))))
    program = traced(spec, recurrent).program
    return Neuron(program, 0, tuple(PARAM_NAMES.index(name) for name in program.params))


@cache
def source_of(
    spec: NeuronSpec | Equations, recurrent: bool, way: str, params_grad: bool = False, element_size: int = 4
) -> str:
    """The source of a layer's kernel: ``way`` is ``"forward"`` or ``"backward"``."""
    neuron = neuron_of(spec, recurrent)
    unroll = unrolled(neuron.program, element_size)
    if way == "forward":
        return forward_source(neuron, recurrent, unroll)
    return backward_source(neuron, recurrent, unroll, params_grad)


def forward_source(neuron: Neuron, recurrent: bool, unroll: int) -> str:
    """A module with ``step`` and the kernel ``forward``."""
    program = neuron.program
    parts = ["divide"] if any(op.kind == "div" for op in program.ops) else []
    parts += ["write_step"] if program.spikes is not None else []
    parts += ["recurrent_current"] if recurrent else []
    writer = ForwardWriter(neuron, recurrent)
    body = writer.recurrent_forward() if recurrent else writer.forward(unroll)
    return _module(program, "Forward", parts, [step_source(program, recurrent), body])


def backward_source(neuron: Neuron, recurrent: bool, unroll: int, params_grad: bool) -> str:
    """A module with ``step``, ``adjoint`` and the kernel ``backward``."""
    program = neuron.program
    parts = ["divide"] if any(op.kind in ("div", "log") for op in program.ops) else []
    parts += ["slope"] if program.spikes is not None else []
    parts += ["recurrent_current", "all_back"] if recurrent else ["paired"]
    parts += ["some_back", "store_bits"] if recurrent and program.direct else []
    writer = BackwardWriter(neuron, recurrent, params_grad)
    body = writer.recurrent_backward() if recurrent else writer.backward(unroll)
    functions = [step_source(program, recurrent), adjoint_source(program, recurrent, params_grad), body]
    return _module(program, "Backward", parts, functions)


def _module(program: Program, way: str, parts: Sequence[str], functions: Sequence[str]) -> str:
    title = f"{way} of a neuron with the states {', '.join(program.states)}"
    head = _HEAD.format(title=title, parts=", ".join(sorted(parts)))
    if not parts:
        head = "\n".join(line for line in head.split("\n") if not line.startswith("from snn_sparse"))
    return head + "\n\n".join(functions)
