"""One step of a neuron given by its equations, with the local derivatives that e-prop needs.

``program.py`` runs the equations; what is computed after them is ``learners/eprop/jacobian.py``'s.
"""

from __future__ import annotations

import numpy as np

from .bits import LANES
from .jit import kernel
from .program import execute
from .rows import surrogate_row


def padded(N: int) -> int:
    """The width of a register for N neurons."""
    return -(-N // LANES) * LANES


@kernel()
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
