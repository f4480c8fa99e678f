"""One step of a neuron given by its equations, with the local derivatives that e-prop needs.

``program.py`` runs the equations; what is computed after them is said by ``snn_sparse_plugin/jacobian.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from ...core.jacobian import Derivatives
from ...core.programs import OPS, Op, Program
from ...core.surrogates import Surrogate
from .bits import LANES
from .jit import kernel
from .memory import array
from .program import execute
from .surrogate import surrogate_row


@kernel(allocates=True)
def step(  # type: ignore[no-untyped-def]
    ops,  # of the program
    more,  # of its derivatives
    sites,  # (S, 2): registers of a spike's argument and of its surrogate's derivative
    results,  # (1 + K,): registers of the output and of the next states
    kept,  # (V,): registers of the derivatives that vary
    regs,  # (R, N padded), parameters and constants in place
    surrogate,
    first_param,
    second_param,
    x,  # (B, N)
    rec,  # (B, N) or empty
    before,  # (K, B, N)
    after,  # out (1 + K, B, N)
    local,  # (V, steps, B, N): row t is written
    t,
):
    K, B, N = before.shape
    width = regs.shape[1]
    site, phi = np.zeros(width, regs.dtype), np.zeros(width, regs.dtype)
    current, at = np.uint32(K), np.uint64(t)
    for b in range(B):
        sample = np.uint64(b)
        for k in range(K):
            for j in range(N):
                regs[np.uint32(k), j] = before[np.uint32(k), sample, j]
        for j in range(N):
            regs[current, j] = x[sample, j]
        if rec.shape[0] > 0:
            for j in range(N):
                regs[current + np.uint32(1), j] = rec[sample, j]
        execute(ops, regs)
        for k in range(K + 1):
            row = np.uint32(results[k])
            for j in range(N):
                after[np.uint32(k), sample, j] = regs[row, j]
        for s in range(sites.shape[0]):
            argument, derivative = np.uint32(sites[s, 0]), np.uint32(sites[s, 1])
            for j in range(width):
                site[j] = regs[argument, j]
            surrogate_row(surrogate, first_param, second_param, -1.0, site, phi)
            for j in range(width):
                regs[derivative, j] = phi[j]
        execute(more, regs)
        for v in range(kept.shape[0]):
            row = np.uint32(kept[v])
            for j in range(N):
                local[np.uint32(v), at, sample, j] = regs[row, j]


def runner(
    program: Program,
    derivatives: Derivatives,
    results: Sequence[int],
    kept: Sequence[int],
    params: Tensor,
    surrogate: Surrogate,
) -> Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, int], None]:
    """A function ``(x, rec, before, after, local, t)`` that runs one step of a neuron, see :func:`step`.

    Args:
        results: registers of the rows of ``after``: the output and the next states.
        kept: registers of the rows of ``local``.
        params: (P, N).
    """
    none = np.empty((0, 0), params.numpy().dtype)
    regs = np.zeros((derivatives.registers, -(-params.shape[1] // LANES) * LANES), none.dtype)
    first, count = program.first_param, len(params)
    regs[first : first + count] = 1  # beyond column N: no NaN
    regs[first : first + count, : params.shape[1]] = params.numpy()
    for at, numbers in ((first + count, program.constants), (program.registers, derivatives.constants)):
        for k, number in enumerate(numbers):
            regs[at + k] = number
    fixed = (
        _encoded(program.ops), _encoded(derivatives.ops), np.array(derivatives.sites, np.int32).reshape(-1, 2),
        np.array(results, np.int32), np.array(kept, np.int32), regs, surrogate.code, *surrogate.packed,
    )  # fmt: skip

    def run(x: Tensor, rec: Tensor | None, before: Tensor, after: Tensor, local: Tensor, t: int) -> None:
        recurrent = none if rec is None else rec.contiguous().numpy()
        step(*fixed, array(x), recurrent, before.numpy(), after.numpy(), local.numpy(), t)

    return run


def _encoded(ops: Sequence[Op]) -> np.ndarray:
    # as ``execute`` takes them; where gradients pass does not matter to it
    rows = [(OPS.index(op.kind), op.out, op.a, op.b, 0, 0) for op in ops]
    return np.array(rows, np.int32).reshape(-1, 6)
