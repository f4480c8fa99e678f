"""E-prop of a layer of LIF and adaptive LIF neurons, a chunk of steps at a time: the way back.

``forward_chunk`` of ``eprop_forward.py`` runs the steps and keeps the pseudo-derivative; ``gradient_chunk`` walks back
over them and touches every trace per synapse once. Rows and events are as there.
"""

from __future__ import annotations

import numpy as np

from .jit import kernel
from .outgoing import sort_events
from .rows import add_rows


@kernel(allocates=True)
def back_scan(  # type: ignore[no-untyped-def]
    b, K, psi, filtered, direct, betas, alpha, rho, kappa, low, carry, nu, nu_a, nu_r, start
):
    """Back over the steps of sample b: nu of the loss, of the adaptation and of the output trace at the end.

    ``start`` (8, P) holds what the state before the chunk does to them: of the loss by v, a and r; of a by v and a; of
    r by v, a and r. Adaptation is looked at from column ``low`` on; without ``carry`` only the loss is.
    """
    P = betas.shape[0]
    dtype = betas.dtype
    zero, one = dtype.type(0), dtype.type(1)
    lam = np.zeros(P, dtype)  # alpha lambda
    mu = np.zeros(P, dtype)
    big = np.zeros(P, dtype)  # kappa Lambda
    lam_a, mu_a = np.zeros(P - low, dtype), np.ones(P - low, dtype)
    lam_r, mu_r = np.zeros(P, dtype), np.zeros(P, dtype)
    power = one
    has_direct, has_r = direct.shape[0] > 0, kappa > zero
    at = np.uint64(b)
    for back in range(K):
        t = np.uint64(K - 1 - back)
        if has_r:
            for j in range(P):
                big[j] += filtered[at, t, j]
        else:
            for j in range(P):
                big[j] = filtered[at, t, j]
        if has_direct:
            for j in range(P):
                q = psi[at, t, j] * (big[j] + mu[j] + direct[at, t, j])
                n = lam[j] + q
                nu[t, j] = n
                mu[j] = rho * mu[j] - betas[j] * q
                lam[j] = alpha * n
        else:
            for j in range(P):
                q = psi[at, t, j] * (big[j] + mu[j])
                n = lam[j] + q
                nu[t, j] = n
                mu[j] = rho * mu[j] - betas[j] * q
                lam[j] = alpha * n
        if has_r:
            for j in range(P):
                big[j] *= kappa
        if not carry:
            continue
        for j in range(P - low):
            q = psi[at, t, j + low] * mu_a[j]
            n = lam_a[j] + q
            nu_a[t, j] = n
            mu_a[j] = rho * mu_a[j] - betas[j + low] * q
            lam_a[j] = alpha * n
        if has_r:
            for j in range(P):
                q = psi[at, t, j] * (power + mu_r[j])
                n = lam_r[j] + q
                nu_r[t, j] = n
                mu_r[j] = rho * mu_r[j] - betas[j] * q
                lam_r[j] = alpha * n
            power *= kappa
    for j in range(P):
        start[0, j], start[1, j], start[2, j] = lam[j], mu[j], big[j] if has_r else zero
        start[5, j], start[6, j], start[7, j] = lam_r[j], mu_r[j], power
    for j in range(P - low):
        start[3, j + low], start[4, j + low] = lam_a[j], mu_a[j]


@kernel(forceinline=True)
def _row(i, b, low, zeta, eps, ebar, start, out):  # type: ignore[no-untyped-def]
    """Row i of the traces: what it adds to the gradient, and what becomes of it in the chunk without new events."""
    i, b = np.uint64(i), np.uint64(b)
    trace = zeta[b, i]
    P = out.shape[1]
    if ebar.shape[0] > 0:
        for j in range(low):
            bar = ebar[b, i, j]
            out[i, j] += start[0, j] * trace + start[2, j] * bar
            ebar[b, i, j] = start[7, j] * bar + start[5, j] * trace
        for k in range(P - low):
            j = k + low
            bar, e = ebar[b, i, j], eps[b, i, k]
            out[i, j] += start[0, j] * trace + start[2, j] * bar + start[1, j] * e
            ebar[b, i, j] = start[7, j] * bar + start[5, j] * trace + start[6, j] * e
            eps[b, i, k] = start[4, j] * e + start[3, j] * trace
    else:
        for j in range(low):
            out[i, j] += start[0, j] * trace
        for k in range(P - low):
            j = k + low
            e = eps[b, i, k]
            out[i, j] += start[0, j] * trace + start[1, j] * e
            eps[b, i, k] = start[4, j] * e + start[3, j] * trace


@kernel(allocates=True)
def gradient_chunk(  # type: ignore[no-untyped-def]
    first,
    last,
    K,
    scalars,  # alpha, rho, kappa
    low,  # no neuron before this one adapts
    carry,  # False: no trace is needed after this chunk
    betas,
    psi,  # (B, K, P)
    filtered,  # (B, K, P): learning signals through the readout
    direct,  # (B, K, P), or empty
    ptr,  # input events
    indices,
    values,
    stride,
    offset,
    zeta,  # (B, M): traces per input
    eps,  # (B, M, P - low): traces of the adaptation per synapse
    ebar,  # (B, M, P): traces of the output per synapse, or empty
    alive,  # (B, M): whether the input has spiked since the sequence began
    out,  # (M, P) of this range: the gradient is added
    rec_ptr,  # the same for the recurrent weights; rows are those of the spikes that came a step before
    rec_indices,
    rec_zeta,
    rec_eps,
    rec_ebar,
    rec_alive,
    rec_out,
):
    P = betas.shape[0]
    dtype = betas.dtype
    alpha, rho, kappa = scalars[0], scalars[1], scalars[2]
    nu = np.empty((K, P), dtype)
    nu_a, nu_r = (
        np.empty((K if carry else 0, P - low), dtype),
        np.empty((K if carry and ebar.shape[0] > 0 else 0, P), dtype),
    )
    start = np.zeros((8, P), dtype)
    powers = np.empty(K + 1, dtype)
    powers[0] = 1
    for t in range(K):
        powers[t + 1] = alpha * powers[t]
    none = values[:0]
    for b in range(first, last):
        back_scan(b, K, psi, filtered, direct, betas, alpha, rho, kappa, low, carry, nu, nu_a, nu_r, start)
        at = b * stride + offset
        _sum_and_carry(
            b,
            K,
            at,
            low,
            carry,
            ptr,
            indices,
            values,
            zeta,
            eps,
            ebar,
            alive,
            out,
            nu,
            nu_a,
            nu_r,
            start,
            powers,
        )
        if rec_out.shape[0] > 0:
            at = b * (K + 2)
            _sum_and_carry(
                b, K, at, low, carry, rec_ptr, rec_indices, none,
                rec_zeta, rec_eps, rec_ebar, rec_alive, rec_out, nu, nu_a, nu_r, start, powers,
            )  # fmt: skip


@kernel(allocates=True)
def _sum_and_carry(  # type: ignore[no-untyped-def]
    b, K, at, low, carry, ptr, indices, values, zeta, eps, ebar, alive, out, nu, nu_a, nu_r, start, powers
):
    starts, rows, scaled = sort_events(out.shape[0], at, at + K, 0, ptr, indices, values)
    one = nu.dtype.type(1)
    for i in range(out.shape[0]):
        some = starts[i + 1] > starts[i]
        if alive[b, i]:
            _row(i, b, low, zeta, eps, ebar, start, out)
        if some:
            add_rows(out, i, nu, rows, scaled, starts[i], starts[i + 1])
        if carry:
            if some:
                if not alive[b, i]:
                    alive[b, i] = True
                    eps[b, i] = 0  # a row holds nothing yet, or what another sequence has left
                    if nu_r.shape[0] > 0:
                        ebar[b, i] = 0
                add_rows(eps[b], i, nu_a, rows, scaled, starts[i], starts[i + 1])
                if nu_r.shape[0] > 0:
                    add_rows(ebar[b], i, nu_r, rows, scaled, starts[i], starts[i + 1])
            trace = powers[K] * zeta[b, i]
            for e in range(starts[i], starts[i + 1]):
                trace += powers[K - 1 - rows[e]] * (scaled[e] if scaled.shape[0] > 0 else one)
            zeta[b, i] = trace


@kernel()
def leaky(x, before, kappa, reverse):  # type: ignore[no-untyped-def]
    """``x_t += kappa x_{t-1}`` in place over (K, columns), from ``before`` on; backwards in time if ``reverse``."""
    K = x.shape[0]
    for k in range(K):
        t = np.uint64(K - 1 - k if reverse else k)
        if k == 0:
            for j in range(x.shape[1]):
                x[t, j] += kappa * before[j]
        else:
            s = t + np.uint64(1) if reverse else t - np.uint64(1)
            for j in range(x.shape[1]):
                x[t, j] += kappa * x[s, j]
