"""Triton source of the scans over all steps of a neuron; :mod:`.generate` has its step and its adjoint.

A thread holds a group of steps in registers. Forward, all loads of a group are issued before the first is used;
backward, the states of a group are made again from a checkpoint and walked back, without a detour through memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from textwrap import dedent, indent

from ..core.backend import CHUNK
from ..core.canonical import traced
from ..core.dynamics import PARAM_NAMES, NeuronSpec
from ..core.equations import Equations
from ..core.programs import Program
from .generate import Names, Neuron, adjoint_source, step_source, unrolled

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
    writer = _Writer(neuron, recurrent)
    body = writer.recurrent_forward() if recurrent else writer.forward(unroll)
    return _module(program, "Forward", parts, [step_source(program, recurrent), body])


def backward_source(neuron: Neuron, recurrent: bool, unroll: int, params_grad: bool) -> str:
    """A module with ``step``, ``adjoint`` and the kernel ``backward``."""
    program = neuron.program
    parts = ["divide"] if any(op.kind in ("div", "log") for op in program.ops) else []
    parts += ["slope"] if program.spikes is not None else []
    parts += ["recurrent_current", "all_back"] if recurrent else []
    parts += ["some_back", "store_bits"] if recurrent and program.direct else []
    writer = _Writer(neuron, recurrent, params_grad)
    body = writer.recurrent_backward() if recurrent else writer.backward(unroll)
    functions = [step_source(program, recurrent), adjoint_source(program, recurrent, params_grad), body]
    return _module(program, "Backward", parts, functions)


def _module(program: Program, way: str, parts: Sequence[str], functions: Sequence[str]) -> str:
    title = f"{way} of a neuron with the states {', '.join(program.states)}"
    head = _HEAD.format(title=title, parts=", ".join(sorted(parts)))
    if not parts:
        head = "\n".join(line for line in head.split("\n") if not line.startswith("from snn_sparse"))
    return head + "\n\n".join(functions)


def _block(text: str, depth: int = 0) -> str:
    return indent(dedent(text).strip("\n"), "    " * depth)


class _Writer:
    """The kernels of one neuron as text, statement by statement."""

    def __init__(self, neuron: Neuron, recurrent: bool, params_grad: bool = False) -> None:
        program = self.program = neuron.program
        self.rows, self.params_grad = neuron.rows, params_grad and bool(program.params)
        self.names = Names(program, recurrent)
        self.states, self.inputs, self.params = self.names.states, self.names.inputs, self.names.params
        self.membrane = self.states[neuron.membrane]
        self.spiking = program.spikes is not None
        self.K, self.C = len(self.states), len(self.inputs)

    # --- what both ways share ---

    def _places(self) -> str:
        lines = [
            "b = tl.program_id(0).to(tl.int64)",
            "first = tl.program_id(1) * BLOCK",
            "cols = first + tl.arange(0, BLOCK)",
            "mask = cols < N",
            "rows = B.to(tl.int64)  # of a step: T * B * N may pass 2^31",
            "stride = x_stride.to(tl.int64)",
            f"x_ptr += b * {_times(self.C, 'N')}",
        ]
        for row, name in zip(self.rows, self.params, strict=True):
            lines.append(f"{name} = tl.load(params_ptr + {_times(row, 'N')} + cols, mask=mask, other=1.0)")
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

    def _load_inputs(self, t: str, mask: str, suffix: str = "") -> list[str]:
        return [
            f"{name}{suffix} = tl.load(x_ptr + ({t}) * stride + {_times(c, 'N')} + cols, mask={mask}, other=0.0)"
            for c, name in enumerate(self.inputs)
        ]

    def _step(self, *, inputs: str = "", keep: bool = True) -> str:
        """``site, s, states = step(states, currents, parameters)``."""
        made = (["site", "s"] if keep else ["_site", "_s"]) if self.spiking else []
        given = [*self.states, *(f"{x}{inputs}" for x in self.inputs), *self.names.rec, *self.params]
        return f"{', '.join([*made, *self.states])} = step({', '.join(given)})"

    def _write(self, row: str) -> str:
        if self.spiking:
            given = f"site, s, {self.membrane}, near, fired, {row}, first, cols, mask, N, n_words"
            return f"near, fired = write_step({given}, words_ptr, spikes_ptr, mem_ptr, WINDOW, BLOCK)"
        return _block(
            f"""
            if mem_ptr is not None:
                tl.store(mem_ptr + ({row}) * N + cols, {self.membrane}, mask=mask)
            """
        )

    def _checkpoint(self, t: str) -> str:
        store = self._store_states("{}_kept", f"{t} // {CHUNK} * chunk_rows + b")
        return (
            f"if {self.states[0]}_kept_ptr is not None:\n    if {t} % {CHUNK} == 0:\n{indent(store, ' ' * 8)}"
        )

    def _forward_kernel(self, arguments: Sequence[str], body: Sequence[str], doc: str) -> str:
        end = [self._store_states("{}_last", "b")]
        if self.spiking:
            end.append(
                "if counts_ptr is not None:\n"
                "    tl.atomic_add(counts_ptr, tl.sum(near.to(tl.int64), axis=0))\n"
                "    tl.atomic_add(counts_ptr + 1, tl.sum(fired.to(tl.int64), axis=0))"
            )
        start = [
            self._places(),
            self._load_states("{}_start", "b"),
            "chunk_rows = checkpoint_rows.to(tl.int64)",
        ]
        start += ["near = tl.zeros([BLOCK], dtype=tl.int32)", "fired = near"] if self.spiking else []
        states = self._pointers("{}_start", "{}_last", "{}_kept")
        free = ["x_stride", "checkpoint_rows", "T", "B"]
        return _kernel("forward", free, [*states, *arguments], [*start, *body, *end], doc)

    def _pointers(self, *kinds: str) -> list[str]:
        return [f"{kind.format(name)}_ptr" for kind in kinds for name in self.states]

    # --- layers that feed nothing back ---

    def forward(self, unroll: int) -> str:
        def group(count: int) -> str:
            lines = [self._checkpoint("start")]
            for j in range(count):
                lines += self._load_inputs(f"start + {j}", "mask", f"_{j}")
            for j in range(count):
                lines += [self._step(inputs=f"_{j}"), self._write(f"(start + {j}) * rows + b")]
            return indent("\n".join(lines), "    ")

        body = [
            f"full = T - T % {unroll}",
            f"for start in range(0, full, {unroll}):\n{group(unroll)}",
            f"for start in range(full, T):\n{group(1)}",
        ]
        return self._forward_kernel(_FORWARD, body, "Grid (B, blocks of N).")

    def backward(self, unroll: int) -> str:
        marks = range(1, CHUNK // unroll)  # of the states between two groups of a chunk
        chunk = [
            "chunk = chunks - 1 - k",
            f"start = chunk * {CHUNK}",
            f"groups = (tl.minimum(T - start, {CHUNK}) + {unroll - 1}) // {unroll}",
            self._load_states("{}_kept", "chunk * chunk_rows + b"),
            *(f"{name}_at{m} = {name}" for m in (0, *marks) for name in self.states),
        ]
        if marks:  # what is loaded here is in the cache when it is loaded again
            ahead = [f"begin = start + g * {unroll}"]
            for j in range(unroll):
                ahead += self._load_inputs(f"begin + {j}", "mask", f"_{j}")
            ahead += [self._step(inputs=f"_{j}", keep=False) for j in range(unroll)]
            ahead += [
                f"{n}_at{m} = tl.where(g == {m - 1}, {n}, {n}_at{m})" for m in marks for n in self.states
            ]
            chunk += ["for g in range(groups - 1):", *_indented(ahead)]
        steps = range(unroll)
        group = ["g = groups - 1 - h", f"begin = start + g * {unroll}"]
        group += [f"live_{j} = cols < tl.where(begin + {j} < T, N, 0)" for j in steps]
        for j in steps:
            group += self._load_inputs(f"begin + {j}", f"live_{j}", f"_{j}")
        group += self._arriving(steps)
        group += [f"{name} = {name}_at0" for name in self.states]
        group += [f"{n} = tl.where(g == {m}, {n}_at{m}, {n})" for m in marks for n in self.states]
        for j in steps:
            group += [f"{name}_{j} = {name}" for name in self.states]
            group += [self._step(inputs=f"_{j}", keep=False)] if j < unroll - 1 else []
        for j in reversed(steps):
            group += self._walk_back(f"_{j}", f"gs_{j}", f"gm_{j}", f"live_{j}", f"(begin + {j}) * rows + b")
        loop = "\n".join(_indented([*chunk, "for h in range(groups):", *_indented(group)]))
        return self._backward_kernel([*_BACKWARD, *_ONCE], loop, "Grid (B, blocks of N).")

    def _arriving(self, steps: Sequence[int]) -> list[str]:
        """The gradients of spikes and membranes of some steps, 0 where none arrives."""
        found = []
        for short, what in (("gs", "spikes_grad"), ("gm", "mem_grad")):
            if short == "gs" and not self.spiking:
                continue
            loads = [
                f"    {short}_{j} = tl.load({what}_ptr + (begin + {j}) * {short}_step + b * N + cols, "
                f"mask=live_{j}, other=0.0)"
                for j in steps
            ]
            nothing = [f"    {short}_{j} = zero" for j in steps]
            found += [f"if {what}_ptr is not None:", *loads, "else:", *nothing]
        return found

    def _walk_back(self, suffix: str, g_s: str, g_mem: str, live: str, row: str) -> list[str]:
        """One step back: the adjoint, its results written or added up."""
        arriving = [f"g_{name}" + (f" + {g_mem}" if name == self.membrane else "") for name in self.states]
        given = [*arriving, *([g_s] if self.spiking else [])]
        given += [f"{name}{suffix}" for name in (*self.states, *self.inputs)]
        given += [*self.names.rec, *self.params, "everywhere", "WINDOW", "KIND", "P0", "P1"]
        leaving = [f"d_{name}" for name in (*self.inputs, *self.states)]
        sums = [f"d_{name}" for name in self.params] if self.params_grad else []
        lines = [f"{', '.join([*leaving, *sums])} = adjoint({', '.join(given)})"]
        lines += [f"g_{name} = tl.where({live}, d_{name}, g_{name})" for name in self.states]
        lines += [f"sum_{name} += tl.where({live}, d_{name}, zero)" for name in (self.params if sums else ())]
        stores = [
            f"tl.store(nu_ptr + ({row}) * {_times(self.C, 'N')} + {_times(c, 'N')} + cols, d_{x}, mask={live})"
            for c, x in enumerate(self.inputs)
        ]
        if self.names.rec:
            return [*lines, *stores]
        once = [f"nu_{x} += tl.where({live}, d_{x}, zero)" for x in self.inputs]
        return [*lines, "if ONCE:", *_indented(once), "else:", *_indented(stores)]

    def _backward_kernel(self, arguments: Sequence[str], loop: str, doc: str) -> str:
        kept = f"tl.load({self.states[0]}_kept_ptr + b * N + cols, mask=mask, other=0.0)"
        like = self.params[0] if self.params else kept
        start = [
            self._places(),
            f"zero = tl.zeros_like({like})",
            "if near_ptr is not None:  # too few came near the threshold: the window is left out",
            "    everywhere = tl.load(near_ptr) < least",
            "else:",
            "    everywhere = False",
            *(line for name in self.states for line in self._last_gradient(name)),
            "chunk_rows = checkpoint_rows.to(tl.int64)",
            "gs_step = spikes_grad_stride.to(tl.int64)",
            "gm_step = mem_grad_stride.to(tl.int64)",
        ]
        start += [f"nu_{x} = zero" for x in self.inputs]
        start += [f"sum_{name} = zero" for name in (self.params if self.params_grad else ())]
        start += [f"chunks = (T + {CHUNK - 1}) // {CHUNK}", f"for k in range(chunks):\n{loop}"]
        end = [self._store_states("d_{}", "b", "g_{}")]
        if not self.names.rec:
            stores = [
                f"tl.store(nu_ptr + b * {_times(self.C, 'N')} + {_times(c, 'N')} + cols, nu_{x}, mask=mask)"
                for c, x in enumerate(self.inputs)
            ]
            end += ["if ONCE:", *_indented(stores)]
        if self.params_grad:
            end += [
                f"tl.store(params_grad_ptr + ({row} * rows + b) * N + cols, sum_{name}, mask=mask)"
                for row, name in zip(self.rows, self.params, strict=True)
            ]
        free = ["x_stride", "checkpoint_rows", "spikes_grad_stride", "mem_grad_stride", "least", "T", "B"]
        states = self._pointers("{}_kept", "g_{}", "d_{}")
        return _kernel("backward", free, [*states, *arguments], [*start, *end], doc)

    def _last_gradient(self, name: str) -> list[str]:
        load = f"g_{name} = tl.load(g_{name}_ptr + b * N + cols, mask=mask, other=0.0)"
        return [f"g_{name} = zero", f"if g_{name}_ptr is not None:", f"    {load}"]

    # --- layers that feed their spikes back: one program has all neurons of a sample ---

    def _recurrent_currents(self, t: str, row: str) -> list[str]:
        return [
            f"{name} = recurrent_current({t}, rec_weight_t_ptr, rec_bias_ptr, rec0_ptr, words_ptr, {row}, b, rows, "
            f"n_words, {_times(self.C, 'N')}, {_times(c, 'N')} + cols, mask, {self.states[0]})"
            for c, name in enumerate(self.names.rec)
        ]

    def recurrent_forward(self) -> str:
        lines = [
            self._checkpoint("t"),
            "row = t * rows + b",
            *self._load_inputs("t", "mask"),
            "tl.debug_barrier()  # the words of the step before were written by other threads",
            *self._recurrent_currents("t", "row"),
            self._step(),
            self._write("row"),
        ]
        loop = "for t in range(0, T):\n" + indent("\n".join(lines), "    ")
        return self._forward_kernel(_RECURRENT_FORWARD, [loop], "Grid (B, 1).")

    def recurrent_backward(self) -> str:
        kept = [*self.states, *self.names.rec]
        places = [f"scratch_ptr + ((j * {len(kept)} + {k}) * rows + b) * N + cols" for k in range(len(kept))]
        loads = [
            f"{name} = tl.load({at}, mask=mask, other=0.0)" for name, at in zip(kept, places, strict=True)
        ]
        replay = [
            "row = (start + j) * rows + b",
            *self._load_inputs("start + j", "mask"),
            *self._recurrent_currents("start + j", "row"),
            *(f"tl.store({at}, {name}, mask=mask)" for name, at in zip(kept, places, strict=True)),
            self._step(keep=False),
        ]
        back = [
            "j = steps - 1 - back",
            "row = (start + j) * rows + b",
            *loads,
            *self._load_inputs("start + j", "mask"),
        ]
        for short, what in (("gs", "spikes_grad"), ("gm", "mem_grad")):
            load = f"tl.load({what}_ptr + (start + j) * {short}_step + b * N + cols, mask=mask, other=0.0)"
            back += [f"{short} = zero", f"if {what}_ptr is not None:", f"    {short} = {load}"]
        back += [*self._fed_back(), *self._walk_back("", "gs", "gm", "mask", "row")]
        back += [f"nu_{x} = d_{x}" for x in self.inputs]
        loop = [
            "chunk = chunks - 1 - k",
            f"start = chunk * {CHUNK}",
            f"steps = tl.minimum(T - start, {CHUNK})",
            self._load_states("{}_kept", "chunk * chunk_rows + b"),
            "for j in range(steps):\n" + indent("\n".join(replay), "    "),
            "tl.debug_barrier()  # scratch may come back to other threads than wrote it",
            "for back in range(steps):\n" + indent("\n".join(back), "    "),
            "tl.debug_barrier()  # the next chunk's replay overwrites the scratch",
        ]
        return self._backward_kernel(_RECURRENT_BACKWARD, indent("\n".join(loop), "    "), "Grid (B, 1).")

    def _fed_back(self) -> list[str]:
        """What the spikes of this step did to the next one. A masked gradient needs it at active neurons only."""
        every = f"gs = all_back(gs, nu_ptr, rec_weight_ptr, row + rows, {_times(self.C, 'N')}, N, cols, mask, TILE)"
        barrier = "tl.debug_barrier()  # nu of the step after was written by other threads"
        if not self.program.direct:
            return [barrier, "if start + j + 1 < T:", f"    {every}"]
        given = ", ".join([*self.states, *self.inputs, *self.names.rec, *self.params])
        made = ", ".join(["site", "_s", *(f"_{name}" for name in self.states)])
        some = [
            f"gs = some_back(gs, bits_ptr + b * n_words, n_words, nu_{x}, rec_weight_t_ptr, "
            f"{_times(self.C, 'N')}, {_times(c, 'N')}, cols, mask)"
            for c, x in enumerate(self.inputs)
        ]
        return [
            "if WINDOW is not None:",
            f"    {made} = step({given})",
            "    active = (tl.abs(site) < WINDOW) & mask",
            "    tl.debug_barrier()  # the bits of the step after have been read",
            "    store_bits(bits_ptr + b * n_words, active, first, n_words, BLOCK)",
            barrier,
            "if start + j + 1 < T:",
            "    if WINDOW is None:",
            f"        {every}",
            "    else:",
            "        if everywhere:",
            f"            {every}",
            "        else:",
            *(f"            {line}" for line in some),
        ]


def _times(count: int, unit: str) -> str:
    return unit if count == 1 else f"{count} * {unit}"


def _indented(lines: Sequence[str]) -> list[str]:
    return ["    " + line for statement in lines for line in statement.split("\n")]


def _kernel(name: str, free: Sequence[str], arguments: Sequence[str], body: Sequence[str], doc: str) -> str:
    head = f"@triton.jit(do_not_specialize={list(free)!r})\ndef {name}(\n    " + ",\n    ".join(arguments)
    return f'{head},\n):\n    """{doc}"""\n' + indent("\n".join(body), "    ") + "\n"


_SIZES = ["T", "B", "N"]
_LAYER = ["rec_weight_t_ptr", "rec_bias_ptr", "rec0_ptr"]
_FORWARD = [
    *(
        "x_ptr",
        "x_stride",
        "checkpoint_rows",
        "params_ptr",
        "words_ptr",
        "spikes_ptr",
        "mem_ptr",
        "counts_ptr",
    ),
    *(*_SIZES, "n_words", "WINDOW: tl.constexpr", "BLOCK: tl.constexpr"),
]
_RECURRENT_FORWARD = [*_LAYER, *_FORWARD]
_BACKWARD = [
    *("x_ptr", "x_stride", "checkpoint_rows", "params_ptr", "near_ptr", "least"),
    *(
        "spikes_grad_ptr",
        "spikes_grad_stride",
        "mem_grad_ptr",
        "mem_grad_stride",
        "nu_ptr",
        "params_grad_ptr",
        *_SIZES,
    ),
    *(f"{name}: tl.constexpr" for name in ("WINDOW", "KIND", "P0", "P1", "BLOCK")),
]
_ONCE = ["ONCE: tl.constexpr"]
_RECURRENT_BACKWARD = [
    *(
        *_LAYER,
        "rec_weight_ptr",
        "words_ptr",
        "scratch_ptr",
        "bits_ptr",
        *_BACKWARD,
        "n_words",
        "TILE: tl.constexpr",
    ),
]
