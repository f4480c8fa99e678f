"""Triton source of the backward scan: the states of a group of steps are made again from a checkpoint, and walked back.

They stay in registers; nothing goes through memory in between, but for a recurrence.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import indent

from ..core.backend import CHUNK
from .writer import FED_BACK, SIZES, Writer, indented, kernel, times


class BackwardWriter(Writer):
    """The kernel ``backward`` of a neuron, with and without a recurrence."""

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
        return self._backward_kernel([*_BACKWARD, "odd_ptr"], loop, "Grid (B, blocks of N).")

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
        places = [f"nu_ptr + ({row}) * {times(self.C, 'N')} + {times(c, 'N')} + cols" for c in range(self.C)]
        stores = [f"tl.store({at}, d_{x}, mask={live})" for at, x in zip(places, self.inputs, strict=True)]
        if self.names.rec:
            return [*lines, *stores]
        sums = [f"nu_{x} += tl.where({live}, d_{x}, zero)" for x in self.inputs]
        lines += ["if sum_ptr is not None:", *indented(sums)]
        pairs = [
            f"tl.store({at}, paired(d_{x}), mask={live})" for at, x in zip(places, self.inputs, strict=True)
        ]
        pairs += [f"odd |= {live} & ~(tl.abs(d_{x}) < float('inf'))" for x in self.inputs]
        either = ["if odd_ptr is not None:", *indented(pairs), "else:", *indented(stores)]
        return [*lines, "if nu_ptr is not None:", *indented(either)]

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
        start += ["odd = cols < 0"] if not self.names.rec else [f"sum_nu_{x} = zero" for x in self.inputs]
        start += [f"sum_{name} = zero" for name in (self.params if self.params_grad else ())]
        start += [f"chunks = (T + {CHUNK - 1}) // {CHUNK}", f"for k in range(chunks):\n{loop}"]
        end = [self._store_states("d_{}", "b", "g_{}")]
        end += ["if sum_ptr is not None:", *indented(self._sums())]
        if not self.names.rec:
            end += ["if odd_ptr is not None:", "    tl.store(odd_ptr + (cols - cols), 1, mask=odd)"]
        if self.params_grad:
            end += [
                f"tl.store(params_grad_ptr + ({row} * rows + b) * N + cols, sum_{name}, mask=mask)"
                for row, name in zip(self.rows, self.params, strict=True)
            ]
        free = ["x_stride", "checkpoint_rows", "spikes_grad_stride", "mem_grad_stride", "least", "T", "B"]
        states = self._pointers("{}_kept", "g_{}", "d_{}")
        return kernel("backward", free, [*states, *arguments], [*start, *end], doc)

    def _sums(self) -> list[str]:
        """Stores of nu summed over the steps; of a recurrent layer also over all but the first, which have its bias."""
        places = [f"sum_ptr + {{}} * {times(self.C, 'N')} + {times(c, 'N')} + cols" for c in range(self.C)]
        named = list(zip(places, self.inputs, strict=True))
        if not self.names.rec:
            return [f"tl.store({at.format('b')}, nu_{x}, mask=mask)" for at, x in named]
        later = [f"tl.store({at.format('(rows + b)')}, sum_nu_{x}, mask=mask)" for at, x in named]
        return [*(f"tl.store({at.format('b')}, sum_nu_{x} + nu_{x}, mask=mask)" for at, x in named), *later]

    def _last_gradient(self, name: str) -> list[str]:
        load = f"g_{name} = tl.load(g_{name}_ptr + b * N + cols, mask=mask, other=0.0)"
        return [f"g_{name} = zero", f"if g_{name}_ptr is not None:", f"    {load}"]

    def recurrent_backward(self) -> str:
        # A step's recurrent current is a sum of rows. It is made once and goes through memory with the states: held in
        # registers, which have no room for a chunk, it would be made twice. A program has one sample: several would
        # read W_rec once for all, but their spikes and active neurons are different ones, to be walked one by one.
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
            load = self._load(f"{what}_ptr + (start + j) * {short}_step + b * N + cols", "mask")
            back += [f"{short} = zero", f"if {what}_ptr is not None:", f"    {short} = {load}"]
        back += [*self._fed_back(), *(f"sum_nu_{x} += nu_{x}" for x in self.inputs)]
        back += self._walk_back("", "gs", "gm", "mask", "row")
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
        every = f"gs = all_back(gs, nu_ptr, rec_weight_ptr, row + rows, {times(self.C, 'N')}, N, cols, mask, TILE)"
        barrier = "tl.debug_barrier()  # nu of the step after was written by other threads"
        if not self.program.direct:
            return [barrier, "if start + j + 1 < T:", f"    {every}"]
        given = ", ".join([*self.states, *self.inputs, *self.names.rec, *self.params])
        made = ", ".join(["site", "_s", *(f"_{name}" for name in self.states)])
        some = [
            f"gs = some_back(gs, bits_ptr + b * n_words, n_words, nu_{x}, rec_weight_t_ptr, "
            f"{times(self.C, 'N')}, {times(c, 'N')}, cols, mask)"
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


_BACKWARD = [
    *("x_ptr", "x_stride", "checkpoint_rows", "params_ptr", "near_ptr", "least"),
    *(
        "spikes_grad_ptr",
        "spikes_grad_stride",
        "mem_grad_ptr",
        "mem_grad_stride",
        "nu_ptr",
        "sum_ptr",
        "params_grad_ptr",
        *SIZES,
    ),
    *(f"{name}: tl.constexpr" for name in ("WINDOW", "KIND", "P0", "P1", "BLOCK")),
]
_RECURRENT_BACKWARD = [
    *(
        *FED_BACK,
        "rec_weight_ptr",
        "words_ptr",
        "scratch_ptr",
        "bits_ptr",
        *_BACKWARD,
        "n_words",
        "TILE: tl.constexpr",
    ),
]
