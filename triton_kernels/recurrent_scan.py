"""Triton source of a recurrent layer's backward scan: each spike went to all neurons of the next step.

A program has whole samples, as nu of every neuron goes back to every other. With an exact gradient it has several: a
tile of W_rec is loaded once for all of them, and multiplied in the registers that it came to. ``tl.dot`` would take it
through shared memory, and tensor cores have no float32. With a masked gradient each sample has active neurons of its
own, so a program has one.

What the spikes fed back, ``rec``, is made by rows of events before, in parallel over the steps. So what is replayed is
each neuron's own, and stays in registers.
"""

from __future__ import annotations

from ..core.backend import CHUNK
from .backward_scan import CONSTANTS, EVERYWHERE, FREE, LAYER, STRIDES, BackwardWriter
from .generate import Neuron
from .writer import SIZES, indented, kernel, times

_ROWS = 4  # tiles of W_rec that are loaded ahead


class RecurrentBackwardWriter(BackwardWriter):
    """The kernel ``backward`` of a recurrent neuron, with ``samples`` to a program."""

    def __init__(self, neuron: Neuron, params_grad: bool, samples: int) -> None:
        super().__init__(neuron, True, params_grad)
        self.samples = samples
        self.width = times(self.C, "N")
        self.masks = self.program.direct and samples == 1

    def all_back(self) -> str:
        """The function ``all_back``: W_rec^T nu of the samples of a program."""
        samples, tiles = range(self.samples), range(_ROWS)
        nu = "tl.load(nu_{j}_ptr + (start{at}){mask}).to(zero.dtype)"
        ahead = []
        for u in tiles:
            at = f"weight_ptr + {u} * TILE * N"
            ahead.append(f"weight_{u} = tl.load({at}, mask=inside, other=0.0).to(zero.dtype)")
            ahead += [f"nu_{j}_{u} = {nu.format(j=j, at=f' + {u} * TILE', mask='')}" for j in samples]
        ahead += [
            f"sum_{j} = tl.fma(nu_{j}_{u}[:, None], weight_{u}, sum_{j})" for u in tiles for j in samples
        ]
        last = [
            "left = start + tile < width",
            "weight = tl.load(weight_ptr, mask=left[:, None] & inside, other=0.0).to(zero.dtype)",
        ]
        for j in samples:
            part = nu.format(j=j, at="", mask=", mask=left, other=0.0")
            last.append(f"sum_{j} = tl.fma({part}[:, None], weight, sum_{j})")
        lines = [
            '"""What nu, of the samples from ``row`` on, sends back through W_rec; none is read beyond ``last``."""',
            "tile = tl.arange(0, TILE)",
            "inside = cols < N",
            "weight_ptr = rec_weight_ptr + tile.to(tl.int64)[:, None] * N + cols",
            *(f"nu_{j}_ptr = nu_ptr + tl.minimum(row + {j}, last) * width + tile" for j in samples),
            *(f"sum_{j} = tl.zeros([TILE, BLOCK], dtype=zero.dtype)" for j in samples),
            f"full = width - width % ({_ROWS} * TILE)",
            f"for start in range(0, full, {_ROWS} * TILE):",
            *indented([*ahead, f"weight_ptr += {_ROWS} * TILE * N"]),
            "for start in range(full, width, TILE):",
            *indented([*last, "weight_ptr += TILE * N"]),
            "back = zero + tl.sum(sum_0, axis=0)[None, :]",
            f"sample = tl.arange(0, {self.samples})[:, None]",
            *(f"back = tl.where(sample == {j}, tl.sum(sum_{j}, axis=0)[None, :], back)" for j in samples[1:]),
            "return back",
        ]
        arguments = "zero, nu_ptr, rec_weight_ptr, row, last, width, N, cols"
        constants = "TILE: tl.constexpr, BLOCK: tl.constexpr"
        return "\n".join([f"@triton.jit\ndef all_back({arguments}, {constants}):", *indented(lines), ""])

    def recurrent_backward(self, unroll: int) -> str:
        marks = range(1, CHUNK // unroll)  # of the states between two groups of a chunk
        chunk = [
            f"start = begin + (chunks - 1 - k) * {CHUNK}",
            f"groups = (tl.minimum(end - start, {CHUNK}) + {unroll - 1}) // {unroll}",
            self._load_states("{}_kept", f"start // {CHUNK} * chunk_rows + b"),
            *(f"{name}_at{m} = {name}" for m in (0, *marks) for name in self.states),
        ]
        ahead = [f"at = start + g * {unroll}", *self._replayed(unroll, "at + {j}")]
        ahead += [f"{n}_at{m} = tl.where(g == {m - 1}, {n}, {n}_at{m})" for m in marks for n in self.states]
        chunk += ["for g in range(groups - 1):", *indented(ahead)]
        group = [
            "g = groups - 1 - h",
            f"at = start + g * {unroll}",
            *(f"{name} = {name}_at0" for name in self.states),
            *(f"{n} = tl.where(g == {m}, {n}_at{m}, {n})" for m in marks for n in self.states),
            *self._replayed(
                unroll - 1, "tl.minimum(at + {j}, end - 1)"
            ),  # what is replayed beyond is not used
            *(f"{name}_{unroll - 1} = {name}" for name in self.states),
            f"count = tl.minimum(end - at, {unroll})",
            "for back in range(count):",
            *indented(self._back(unroll)),
        ]
        chunk += ["for h in range(groups):", *indented(group)]
        return self._kernel(["for k in range(chunks):", *indented(chunk)])

    def _currents(self, t: str, suffix: str = "") -> list[str]:
        """What comes in and what the spikes of the step before fed back, which is kept for the launch's own steps."""
        at = f"rec_ptr + (({t} - begin) * rows + b) * {self.width} + "
        loads = [
            f"{name}{suffix} = tl.load({at}{times(c, 'N')} + cols, mask=mask, other=0.0)"
            for c, name in enumerate(self.names.rec)
        ]
        return [*self._load_inputs(t, "mask", suffix), *loads]

    def _replayed(self, steps: int, t: str) -> list[str]:
        """Some steps, the j-th ``t``, from the states that hold at ``at``; those before each are kept."""
        lines = []
        for j in range(steps):
            lines += self._currents(t.format(j=j), f"_{j}")
        for j in range(steps):
            lines += [
                *(f"{name}_{j} = {name}" for name in self.states),
                self._step(inputs=f"_{j}", keep=False),
            ]
        return lines

    def _back(self, unroll: int) -> list[str]:
        """One step back. It is written once for all steps of a group: products are long."""
        lines = ["j = count - 1 - back", "t = at + j", "row = t * rows + b"]
        lines += [f"{name} = {name}_0" for name in self.states]
        lines += [
            f"{name} = tl.where(j == {j}, {name}_{j}, {name})"
            for j in range(1, unroll)
            for name in self.states
        ]
        lines += self._currents("t")
        for short, what in (("gs", "spikes_grad"), ("gm", "mem_grad")):
            load = self._load(f"{what}_ptr + t * {short}_step + b * N + cols", "mask")
            lines += [f"{short} = zero", f"if {what}_ptr is not None:", f"    {short} = {load}"]
        lines += [*self._fed_back(), *self._adjoint("", "gs", "gm", "mask")]
        for at, x in zip(self._nu("row"), self.inputs, strict=True):
            lines += [
                f"nu_{x} = tl.where(mask, d_{x}, zero)",
                f"tl.store({at}, nu_{x}, mask=mask)",
                f"sum_nu_{x} += tl.where(t > 0, nu_{x}, zero)",
            ]
        return lines

    def _fed_back(self) -> list[str]:
        """What the spikes of this step did to the next one. A masked gradient needs it at active neurons only."""
        barrier = "tl.debug_barrier()  # nu of the step after was written by other threads"
        after = "(t + 1) * rows"
        rows = f"{after} + first, {after} + rows - 1"
        every = f"gs += all_back(zero, nu_ptr, rec_weight_ptr, {rows}, {self.width}, N, cols, TILE, BLOCK)"
        if not self.masks:
            return [barrier, "if t + 1 < T:", f"    {every}"]
        given = ", ".join([*self.states, *self.inputs, *self.names.rec, *self.params])
        made = ", ".join(["site", "_s", *(f"_{name}" for name in self.states)])
        some = [
            f"gs = some_back(gs, active_ptr, n_words, nu_{x}, rec_weight_t_ptr, {self.width}, {times(c, 'N')}, "
            "cols, mask, WORDS)"
            for c, x in enumerate(self.inputs)
        ]
        return [
            "if WINDOW is not None:",
            f"    {made} = step({given})",
            "    # two rows take turns: when one is written again, every thread has passed the barrier after it",
            "    active_ptr = bits_ptr + (t % 2 * rows + first) * n_words",
            "    store_bits(active_ptr, (tl.abs(site) < WINDOW) & mask, 0, n_words, BLOCK)",
            barrier,
            "if t + 1 < T:",
            "    if WINDOW is None:",
            f"        {every}",
            "    elif everywhere:",
            f"        {every}",
            "    else:",
            *(f"        {line}" for line in some),
        ]

    def _kernel(self, loop: list[str]) -> str:
        param = "tl.load(params_ptr + {row} + cols, mask=cols < N, other=1.0)"
        every = f"[{self.samples}, BLOCK]"
        start = [
            f"first = tl.program_id(0).to(tl.int64) * {self.samples}",
            f"b = first + tl.arange(0, {self.samples})[:, None]",
            "cols = tl.arange(0, BLOCK)[None, :]",
            "mask = (b < B) & (cols < N)",
            "rows = B.to(tl.int64)  # of a step: T * B * N may pass 2^31",
            "stride = x_stride.to(tl.int64)",
            f"x_ptr += b * {self.width}",
            *(
                f"{name} = tl.broadcast_to({param.format(row=times(row, 'N'))}, {every})"
                for row, name in zip(self.rows, self.params, strict=True)
            ),
            self._load_states("g_{}", "b", "g_{}"),
            f"zero = tl.zeros_like(g_{self.states[0]})",
            *EVERYWHERE,
            *STRIDES,
        ]
        end = [self._store_states("g_{}", "b", "g_{}")]
        # of all steps but the first, and of all: the first has no recurrent bias
        sums = [f"sum_ptr + (rows + b) * {self.width} + {times(c, 'N')} + cols" for c in range(self.C)]
        every = [f"sum_ptr + b * {self.width} + {times(c, 'N')} + cols" for c in range(self.C)]
        for x, nu, later, both in zip(self.inputs, self._nu("end * rows + b"), sums, every, strict=True):
            start += [
                *(
                    f"nu_{x} = zero",
                    "if end < T:",
                    f"    nu_{x} = tl.load({nu}, mask=mask, other=0.0).to(zero.dtype)",
                ),
                *(f"sum_nu_{x} = zero", "if sum_ptr is not None:"),
                f"    sum_nu_{x} = tl.load({later}, mask=mask, other=0.0)",
            ]
            end += [
                "if sum_ptr is not None:",
                f"    tl.store({later}, sum_nu_{x}, mask=mask)",
                "    if begin == 0:",
                f"        tl.store({both}, sum_nu_{x} + nu_{x}, mask=mask)",
            ]
        for at, name in self._params_sums():
            start.append(f"sum_{name} = tl.load({at}, mask=mask, other=0.0)")
            end.append(f"tl.store({at}, sum_{name}, mask=mask)")
        start += [f"chunks = (end - begin + {CHUNK - 1}) // {CHUNK}"]
        arguments = [
            *self._pointers("{}_kept", "g_{}"),
            *("rec_ptr", "rec_weight_ptr", "rec_weight_t_ptr", "bits_ptr"),
            *(*LAYER, "begin", "end", *SIZES, "n_words"),
            *(*CONSTANTS, "TILE: tl.constexpr", "WORDS: tl.constexpr"),
        ]
        doc = f"Steps ``begin`` to ``end``, {self.samples} of the B samples to a program: grid (of them, 1)."
        return kernel("backward", [*FREE, "begin", "end"], arguments, [*start, *loop, *end], doc)
