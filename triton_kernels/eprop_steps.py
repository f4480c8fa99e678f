"""All steps of a chunk of a spiking neuron, recurrent or not, with their local derivatives, in one launch.

The step is that of :mod:`.eprop_step`. With a recurrence a program holds one sample's neurons and adds the rows of the
spikes of the step before.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import indent

import torch
import triton
from torch import Tensor

from ..core.jacobian import Derivatives
from ..core.programs import Program
from ..core.surrogates import Surrogate
from .eprop_step import statements
from .generate import Names
from .sources import module_of

_SOURCE = '''"""A chunk of steps of e-prop of a neuron with the states {states}. Generated; a change to it is lost."""

import triton
import triton.language as tl

from snn_sparse_plugin.triton_kernels.parts import divide, gather_rows, slope, store_bits


@triton.jit(do_not_specialize=["T", "B"])
def chunk(
    x_ptr,  # (T, B, N)
    rec_weight_t_ptr,  # (N, N), row m is what spike m adds; or None
    words_ptr,  # (1 + T, B, n_words): row 0 has the spikes before, the others are written; or None
    spikes_ptr,  # (1 + T, B, N): rows 1 and on are written
    before_ptr,  # (K, B, N)
    params_ptr,  # (P, N)
    after_ptr,  # out (K, B, N): the last states
    local_ptr,  # out (V, T, B, N)
    T,
    B,
    N,
    n_words,
    KIND: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B, blocks of N); (B, 1) with a recurrence."""
    b = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    cols = first + tl.arange(0, BLOCK)
    mask = cols < N
    rows = B.to(tl.int64)
    full = T.to(tl.int64) * rows
{begin}
    for t in range(0, T):
        row = t * rows + b
{step}
{end}
'''


def source_of(program: Program, derivatives: Derivatives, kept: tuple[int, ...]) -> str:
    """The kernel ``chunk``; ``kept`` are the registers that it writes to ``local``."""
    names = Names(program, True)
    (x,), (rec,), states = names.inputs, names.rec, names.states
    load = "{} = tl.load({} + cols, mask=mask, other={})"
    begin = [load.format(n, f"before_ptr + ({k} * rows + b) * N", 0.0) for k, n in enumerate(states)]
    begin += [load.format(n, f"params_ptr + {k} * N", 1.0) for k, n in enumerate(names.params)]
    step = [load.format(x, "x_ptr + row * N", 0.0), f"{rec} = tl.zeros_like({x})"]
    before = "words_ptr + row * n_words, 0, n_words, None, 0"
    step += [
        "if rec_weight_t_ptr is not None:",
        "    tl.debug_barrier()  # the words of the step before were written by other threads",
        f"    {rec} = gather_rows({rec}, {before}, rec_weight_t_ptr, N, cols, mask)",
    ]
    computed, of = statements(program, derivatives, names)
    assert program.spikes is not None
    s = of[program.spikes]
    step += [*computed, f"tl.store(spikes_ptr + (row + rows) * N + cols, {s}, mask=mask)"]
    step += [
        "if words_ptr is not None:",
        f"    store_bits(words_ptr + (row + rows) * n_words, ({s} > 0) & mask, first, n_words, BLOCK)",
    ]
    step += [
        f"tl.store(local_ptr + ({k} * full + row) * N + cols, {of[register]}, mask=mask)"
        for k, register in enumerate(kept)
    ]
    step += [f"_after{k} = {of[register]}" for k, register in enumerate(program.results)]
    step += [f"{name} = _after{k}" for k, name in enumerate(states)]
    end = [f"tl.store(after_ptr + ({k} * rows + b) * N + cols, {n}, mask=mask)" for k, n in enumerate(states)]
    return _SOURCE.format(
        states=", ".join(program.states),
        begin=indent("\n".join(begin), " " * 4),
        step=indent("\n".join(step), " " * 8),
        end=indent("\n".join(end), " " * 4),
    )


class Chunk:
    """Runs chunks of one neuron.

    Args:
        kept: registers of the rows of the derivatives.
        params: (P, N).
    """

    def __init__(
        self,
        program: Program,
        derivatives: Derivatives,
        kept: Sequence[int],
        params: Tensor,
        surrogate: Surrogate,
    ) -> None:
        self.kernel = module_of(source_of(program, derivatives, tuple(kept)), "eprop_steps").chunk
        self.params, self.surrogate = params.contiguous(), surrogate

    def __call__(
        self,
        x: Tensor,
        rec_weight: Tensor | None,
        words: Tensor | None,
        spikes: Tensor,
        states: Tensor,
        local: Tensor,
    ) -> None:
        """Run x (K, B, N) from ``states`` (S, B, N), which become the last ones.

        ``spikes`` (1 + K, B, N), ``words`` (1 + K, B, ceil(N / 32)) int32 and ``local`` (V, K, B, N) are written. Row 0
        of ``words`` has the spikes before, of which ``rec_weight`` (N, N) makes a current.
        """
        K, B, N = x.shape
        block = max(32, triton.next_power_of_2(N))
        if rec_weight is None:
            block = min(128, block)
        p0, p1 = self.surrogate.packed
        with torch.cuda.device_of(x):
            self.kernel[(B, triton.cdiv(N, block))](
                x.contiguous(), None if rec_weight is None else rec_weight.t().contiguous(), words, spikes,
                states, self.params, states, local, K, B, N, triton.cdiv(N, 32),
                KIND=self.surrogate.kind, P0=p0, P1=p1, BLOCK=block, num_warps=max(1, min(16, block // 32)),
                enable_fp_fusion=False,  # one rounding where upstream has two would move spikes
            )  # fmt: skip
