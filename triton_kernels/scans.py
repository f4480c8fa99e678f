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
from .recurrent_scan import RecurrentBackwardWriter

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
    spec: NeuronSpec | Equations,
    recurrent: bool,
    way: str,
    params_grad: bool = False,
    element_size: int = 4,
    samples: int = 1,
) -> str:
    """The source of a layer's kernel: ``way`` is ``"forward"`` or ``"backward"``.

    ``samples`` is how many a program of a recurrent layer's backward has.
    """
    neuron = neuron_of(spec, recurrent)
    unroll = unrolled(neuron.program, element_size)
    if way == "forward":
        return forward_source(neuron, recurrent, unroll)
    if recurrent:
        return recurrent_backward_source(neuron, min(8, unroll), params_grad, samples)
    return backward_source(neuron, unroll, params_grad)


def forward_source(neuron: Neuron, recurrent: bool, unroll: int) -> str:
    """A module with ``step`` and the kernel ``forward``."""
    program = neuron.program
    parts = ["divide"] if any(op.kind == "div" for op in program.ops) else []
    parts += ["write_step"] if program.spikes is not None else []
    parts += ["recurrent_current"] if recurrent else []
    writer = ForwardWriter(neuron, recurrent)
    body = writer.recurrent_forward() if recurrent else writer.forward(unroll)
    return _module(program, "Forward", parts, [step_source(program, recurrent), body])


def backward_source(neuron: Neuron, unroll: int, params_grad: bool) -> str:
    """A module with ``step``, ``adjoint`` and the kernel ``backward``."""
    body = BackwardWriter(neuron, False, params_grad).backward(unroll)
    return _backward_module(neuron.program, False, params_grad, ["paired"], [body])


def recurrent_backward_source(neuron: Neuron, unroll: int, params_grad: bool, samples: int) -> str:
    """The same of a recurrent layer, with ``all_back`` and ``samples`` to a program."""
    writer = RecurrentBackwardWriter(neuron, params_grad, samples)
    parts = ["some_back", "store_bits"] if writer.masks else []
    return _backward_module(
        neuron.program, True, params_grad, parts, [writer.all_back(), writer.recurrent_backward(unroll)]
    )


def _backward_module(
    program: Program, recurrent: bool, params_grad: bool, parts: Sequence[str], functions: Sequence[str]
) -> str:
    more = ["divide"] if any(op.kind in ("div", "log") for op in program.ops) else []
    more += ["slope"] if program.spikes is not None else []
    step = [step_source(program, recurrent), adjoint_source(program, recurrent, params_grad)]
    return _module(program, "Backward", [*parts, *more], [*step, *functions])


def _module(program: Program, way: str, parts: Sequence[str], functions: Sequence[str]) -> str:
    title = f"{way} of a neuron with the states {', '.join(program.states)}"
    head = _HEAD.format(title=title, parts=", ".join(sorted(parts)))
    if not parts:
        head = "\n".join(line for line in head.split("\n") if not line.startswith("from snn_sparse"))
    return head + "\n\n".join(functions)
