"""Triton source of the forward scan: all loads of a group of steps are issued before the first is used."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import indent

from ..core.backend import CHUNK
from .writer import FED_BACK, SIZES, Writer, kernel


class ForwardWriter(Writer):
    """The kernel ``forward`` of a neuron, with and without a recurrence."""

    def _write(self, row: str) -> str:
        if self.spiking:
            given = f"site, s, {self.membrane}, near, {row}, first, cols, mask, N, n_words"
            return f"near = write_step({given}, words_ptr, spikes_ptr, mem_ptr, WINDOW, BLOCK)"
        store = f"tl.store(mem_ptr + ({row}) * N + cols, {self.membrane}, mask=mask)"
        return f"if mem_ptr is not None:\n    {store}"

    def _checkpoint(self, t: str) -> str:
        store = self._store_states("{}_kept", f"{t} // {CHUNK} * chunk_rows + b")
        return (
            f"if {self.states[0]}_kept_ptr is not None:\n    if {t} % {CHUNK} == 0:\n{indent(store, ' ' * 8)}"
        )

    def _forward_kernel(self, arguments: Sequence[str], body: Sequence[str], doc: str) -> str:
        end = [self._store_states("{}_last", "b")]
        if self.spiking:
            end.append(
                "if near_ptr is not None:\n    tl.atomic_add(near_ptr, tl.sum(near.to(tl.int64), axis=0))"
            )
        start = [
            self._places(),
            self._load_states("{}_start", "b"),
            "chunk_rows = checkpoint_rows.to(tl.int64)",
        ]
        start += ["near = tl.zeros([BLOCK], dtype=tl.int32)"] if self.spiking else []
        states = self._pointers("{}_start", "{}_last", "{}_kept")
        free = ["x_stride", "checkpoint_rows", "T", "B"]
        return kernel("forward", free, [*states, *arguments], [*start, *body, *end], doc)

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


_FORWARD = [
    *("x_ptr", "x_stride", "checkpoint_rows", "params_ptr", "words_ptr", "spikes_ptr", "mem_ptr", "near_ptr"),
    *(*SIZES, "n_words", "WINDOW: tl.constexpr", "BLOCK: tl.constexpr"),
]
_RECURRENT_FORWARD = [*FED_BACK, *_FORWARD]
