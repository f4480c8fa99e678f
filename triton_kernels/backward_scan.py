"""Triton source of the backward scan: the states of a group of steps are made again from a checkpoint, and walked back.

They stay in registers; nothing goes through memory in between.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core.backend import CHUNK
from .writer import SIZES, Writer, indented, kernel, times


class BackwardWriter(Writer):
    """The kernel ``backward`` of a neuron that hears its input alone."""

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
            chunk += ["for g in range(groups - 1):", *indented(ahead)]
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
        loop = "\n".join(indented([*chunk, "for h in range(groups):", *indented(group)]))
        return self._backward_kernel(loop)

    def _arriving(self, steps: Sequence[int]) -> list[str]:
        """The gradients of spikes and membranes of some steps, 0 where none arrives."""
        found = []
        for short, what in (("gs", "spikes_grad"), ("gm", "mem_grad")):
            if short == "gs" and not self.spiking:
                continue
            at = "{what}_ptr + (begin + {j}) * {short}_step + b * N + cols"
            loads = [
                f"    {short}_{j} = {self._load(at.format(what=what, short=short, j=j), f'live_{j}')}"
                for j in steps
            ]
            nothing = [f"    {short}_{j} = zero" for j in steps]
            found += [f"if {what}_ptr is not None:", *loads, "else:", *nothing]
        return found

    def _adjoint(self, suffix: str, g_s: str, g_mem: str, live: str) -> list[str]:
        """One step back: the gradients of its currents, and those of the states and parameters brought up to date."""
        arriving = [f"g_{name}" + (f" + {g_mem}" if name == self.membrane else "") for name in self.states]
        given = [*arriving, *([g_s] if self.spiking else [])]
        given += [f"{name}{suffix}" for name in (*self.states, *self.inputs)]
        given += [*self.names.rec, *self.params, "everywhere", "WINDOW", "KIND", "P0", "P1"]
        leaving = [f"d_{name}" for name in (*self.inputs, *self.states)]
        sums = [f"d_{name}" for name in self.params] if self.params_grad else []
        lines = [f"{', '.join([*leaving, *sums])} = adjoint({', '.join(given)})"]
        lines += [f"g_{name} = tl.where({live}, d_{name}, g_{name})" for name in self.states]
        lines += [f"sum_{name} += tl.where({live}, d_{name}, zero)" for name in (self.params if sums else ())]
        return lines

    def _nu(self, row: str) -> list[str]:
        """Where the gradient of each current of a row is."""
        return [f"nu_ptr + ({row}) * {times(self.C, 'N')} + {times(c, 'N')} + cols" for c in range(self.C)]

    def _walk_back(self, suffix: str, g_s: str, g_mem: str, live: str, row: str) -> list[str]:
        """One step back, its results written or added up."""
        lines = self._adjoint(suffix, g_s, g_mem, live)
        places = list(zip(self._nu(row), self.inputs, strict=True))
        lines += ["if sum_ptr is not None:"]
        lines += [f"    nu_{x} += tl.where({live}, d_{x}, zero)" for x in self.inputs]
        pairs = [f"tl.store({at}, paired(d_{x}), mask={live})" for at, x in places]
        pairs += [f"odd |= {live} & ~(tl.abs(d_{x}) < float('inf'))" for x in self.inputs]
        stores = [f"tl.store({at}, d_{x}, mask={live})" for at, x in places]
        either = ["if odd_ptr is not None:", *indented(pairs), "else:", *indented(stores)]
        return [*lines, "if nu_ptr is not None:", *indented(either)]

    def _backward_kernel(self, loop: str) -> str:
        kept = f"tl.load({self.states[0]}_kept_ptr + b * N + cols, mask=mask, other=0.0)"
        like = self.params[0] if self.params else kept
        start = [
            self._places(),
            f"zero = tl.zeros_like({like})",
            *EVERYWHERE,
            *(line for name in self.states for line in self._last_gradient(name)),
            *STRIDES,
            *(f"nu_{x} = zero" for x in self.inputs),
            "odd = cols < 0",
            *(f"sum_{name} = zero" for name in (self.params if self.params_grad else ())),
            f"chunks = (T + {CHUNK - 1}) // {CHUNK}",
            f"for k in range(chunks):\n{loop}",
        ]
        end = [self._store_states("d_{}", "b", "g_{}"), "if sum_ptr is not None:"]
        end += [
            f"    tl.store(sum_ptr + b * {times(self.C, 'N')} + {times(c, 'N')} + cols, nu_{x}, mask=mask)"
            for c, x in enumerate(self.inputs)
        ]
        end += ["if odd_ptr is not None:", "    tl.store(odd_ptr + (cols - cols), 1, mask=odd)"]
        end += [f"tl.store({at}, sum_{name}, mask=mask)" for at, name in self._params_sums()]
        states = self._pointers("{}_kept", "g_{}", "d_{}")
        arguments = [*states, *LAYER, *SIZES, *CONSTANTS, "odd_ptr"]
        return kernel("backward", FREE, arguments, [*start, *end], "Grid (B, blocks of N).")

    def _params_sums(self) -> list[tuple[str, str]]:
        """Where the gradient of each parameter is, for the samples apart."""
        named = zip(self.rows, self.params, strict=True) if self.params_grad else ()
        return [(f"params_grad_ptr + ({row} * rows + b) * N + cols", name) for row, name in named]

    def _last_gradient(self, name: str) -> list[str]:
        load = f"g_{name} = tl.load(g_{name}_ptr + b * N + cols, mask=mask, other=0.0)"
        return [f"g_{name} = zero", f"if g_{name}_ptr is not None:", f"    {load}"]


EVERYWHERE = [
    "if near_ptr is not None:  # too few came near the threshold: the window is left out",
    "    everywhere = tl.load(near_ptr) < least",
    "else:",
    "    everywhere = False",
]
STRIDES = [
    "chunk_rows = checkpoint_rows.to(tl.int64)",
    "gs_step = spikes_grad_stride.to(tl.int64)",
    "gm_step = mem_grad_stride.to(tl.int64)",
]
LAYER = [
    *("x_ptr", "x_stride", "checkpoint_rows", "params_ptr", "near_ptr", "least"),
    *("spikes_grad_ptr", "spikes_grad_stride", "mem_grad_ptr", "mem_grad_stride"),
    *("nu_ptr", "sum_ptr", "params_grad_ptr"),
]
CONSTANTS = [f"{name}: tl.constexpr" for name in ("WINDOW", "KIND", "P0", "P1", "BLOCK")]
FREE = ["x_stride", "checkpoint_rows", "spikes_grad_stride", "mem_grad_stride", "least", "T", "B"]
