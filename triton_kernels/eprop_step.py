"""One step of a neuron with the local derivatives that e-prop needs, in one launch of a kernel generated for it.

What is computed after the equations is said by ``snn_sparse_plugin/core/jacobian.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import indent

import torch
import triton
from torch import Tensor

from ..core.jacobian import Derivatives
from ..core.programs import Program
from ..core.surrogates import Surrogate
from .generate import Names, constant, operations
from .sources import module_of

_SOURCE = '''"""One step of e-prop of a neuron with the states {states}. Generated; a change to it is lost."""

import triton
import triton.language as tl

from snn_sparse_plugin.triton_kernels.parts import divide, slope


@triton.jit(do_not_specialize=["t", "steps", "B"])
def step(
    x_ptr,  # (B, N)
    rec_ptr,  # (B, N) or None
    before_ptr,  # (K, B, N)
    params_ptr,  # (P, N)
    after_ptr,  # out (1 + K, B, N): the output and the next states
    local_ptr,  # out (V, steps, B, N): row t of each derivative is written
    t,
    steps,
    B,
    N,
    KIND: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B, blocks of N)."""
    b = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    rows = B.to(tl.int64)
    row = t.to(tl.int64) * rows + b
    span = steps.to(tl.int64) * rows
{body}
'''


def source_of(
    program: Program, derivatives: Derivatives, results: tuple[int, ...], kept: tuple[int, ...]
) -> str:
    """The kernel ``step``; ``results`` and ``kept`` are the registers it writes to ``after`` and ``local``."""
    names = Names(program, True)
    (x,), (rec,) = names.inputs, names.rec
    lines = [
        f"{name} = tl.load(before_ptr + ({k} * rows + b) * N + cols, mask=mask, other=0.0)"
        for k, name in enumerate(names.states)
    ]
    lines += [
        f"{name} = tl.load(params_ptr + {k} * N + cols, mask=mask, other=1.0)"
        for k, name in enumerate(names.params)
    ]
    load = "tl.load({}_ptr + b * N + cols, mask=mask, other=0.0)"
    lines += [f"{x} = {load.format('x')}", f"{rec} = tl.zeros_like({x})"]
    lines += ["if rec_ptr is not None:", f"    {rec} = {load.format('rec')}"]
    computed, of = statements(program, derivatives, names)
    lines += computed
    for k, register in enumerate(results):
        lines.append(f"tl.store(after_ptr + ({k} * rows + b) * N + cols, {of[register]}, mask=mask)")
    for k, register in enumerate(kept):
        lines.append(f"tl.store(local_ptr + ({k} * span + row) * N + cols, {of[register]}, mask=mask)")
    return _SOURCE.format(states=", ".join(program.states), body=indent("\n".join(lines), "    "))


def statements(program: Program, derivatives: Derivatives, names: Names) -> tuple[list[str], dict[int, str]]:
    """A step and its local derivatives, and the variable of each register."""
    first = names.states[0]
    lines = [constant(*pair, first) for pair in zip(names.constants, program.constants, strict=True)]
    lines += operations(program.ops, names.of)
    of = names.of | {k: f"r{k}" for k in range(program.registers, derivatives.registers)}
    more = range(program.registers, program.registers + len(derivatives.constants))
    lines += [constant(of[k], value, first) for k, value in zip(more, derivatives.constants, strict=True)]
    lines += [f"{of[out]} = slope({of[a]}, False, None, KIND, P0, P1)" for a, out in derivatives.sites]
    return lines + operations(derivatives.ops, of), of


def runner(
    program: Program,
    derivatives: Derivatives,
    results: Sequence[int],
    kept: Sequence[int],
    params: Tensor,
    surrogate: Surrogate,
) -> Callable[..., None]:
    """A function ``(x, rec, before, after, local, t)`` that runs one step of a neuron.

    Args:
        results: registers of the rows of ``after``: the output and the next states.
        kept: registers of the rows of ``local``.
        params: (P, N).
    """
    kernel = module_of(source_of(program, derivatives, tuple(results), tuple(kept)), "eprop").step
    p0, p1 = surrogate.packed
    N = params.shape[1]
    block = min(256, max(32, triton.next_power_of_2(N)))
    params = params.contiguous()

    def run(x: Tensor, rec: Tensor | None, before: Tensor, after: Tensor, local: Tensor, t: int) -> None:
        B = x.shape[0]
        kernel[(B, triton.cdiv(N, block))](
            x.contiguous(),
            None if rec is None else rec.contiguous(),
            before,
            params,
            after,
            local if len(kept) else torch.empty_like(after[:0]),
            t,
            local.shape[1],
            B,
            N,
            KIND=surrogate.kind,
            P0=p0,
            P1=p1,
            BLOCK=block,
            num_warps=max(1, block // 64),
            enable_fp_fusion=False,  # one rounding where upstream has two would move spikes
        )

    return run
