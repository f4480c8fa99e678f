"""The steps of a layer of LIF and adaptive LIF neurons, a chunk at a time, as e-prop needs them.

Rows are one sample's N neurons, padded to whole vectors; events of sample b and step t are row
``b * stride + offset + t`` of a CSR pattern.
"""

from __future__ import annotations

import numpy as np

from .jit import kernel


@kernel(forceinline=True)
def _gather(out, weight, ptr, indices, values, r):  # type: ignore[no-untyped-def]
    """``out = sum of value * weight[index]`` over the events of row r."""
    zero = out.dtype.type(0)
    for j in range(out.shape[0]):
        out[j] = zero
    for e in range(ptr[np.uint64(r)], ptr[np.uint64(r) + np.uint64(1)]):
        i = np.uint32(indices[np.uint64(e)])
        if values.shape[0] > 0:
            value = values[np.uint64(e)]
            for j in range(out.shape[0]):
                out[j] += value * weight[i, j]
        else:
            for j in range(out.shape[0]):
                out[j] += weight[i, j]


@kernel(allocates=True)
def forward_chunk(  # type: ignore[no-untyped-def]
    first,  # samples first..last
    last,
    K,
    ptr,  # input events
    indices,
    values,
    stride,
    offset,
    weight,  # (M, P), rows of W_in^T
    rec_weight,  # (N, P), rows of W_rec^T, or empty
    betas,  # (P,)
    scalars,  # alpha, rho, v_th, gamma_pd, rate decay, c_reg, f*
    refractory,
    N,
    v,  # (B, P) and so on: state in, state out
    a,
    left,  # refractory steps left
    z,  # the last spikes
    rate,  # (B, P), or empty without regularisation
    own_ptr,  # out (B * (K + 2),): row b (K + 2) holds the spikes before the chunk, row t + 1 those of step t
    own,  # out (B, (K + 1) N + 1): their columns
    spikes,  # out (K, B, N)
    psi,  # out (B, K, P)
    direct,  # (B, K, P): what acts on spikes is added, or empty
):
    P = v.shape[1]
    dtype = v.dtype
    zero, one = dtype.type(0), dtype.type(1)
    alpha, rho, v_th, height = scalars[0], scalars[1], scalars[2], scalars[3]
    decay, strength, target = scalars[4], scalars[5], scalars[6]
    current, fed_back = np.zeros(P, dtype), np.zeros(P, dtype)
    none = values[:0]
    flat = own.reshape(-1)
    has_rate = rate.shape[0] > 0
    fixed = dtype.type(refractory)
    for b in range(first, last):
        at = np.uint64(b)
        base = b * (K + 2)
        end = b * own.shape[1]
        own_ptr[base] = end
        for j in range(N):
            flat[np.uint64(end)] = j
            end += 1 if z[at, j] > zero else 0
        own_ptr[base + 1] = end
        for t in range(K):
            step, row = np.uint64(t), base + t
            _gather(current, weight, ptr, indices, values, b * stride + offset + t)
            if rec_weight.shape[0] > 0:
                _gather(fed_back, rec_weight, own_ptr, flat, none, row)
                for j in range(P):
                    current[j] += fed_back[j]
            for j in range(P):
                u = (alpha * v[at, j] + current[j]) - v_th * z[at, j]
                v[at, j] = u
                x = ((u - v_th) - betas[j] * a[at, j]) / v_th
                free = left[at, j] == zero
                z[at, j] = one if x > zero and free else zero
                psi[at, step, j] = height * max(one - abs(x), zero) / v_th if free else zero
            for j in range(P):
                a[at, j] = rho * a[at, j] + z[at, j]
                left[at, j] = fixed if z[at, j] > zero else max(left[at, j] - one, zero)
            if has_rate:
                for j in range(P):
                    f = decay * rate[at, j] + (one - decay) * z[at, j]
                    rate[at, j] = f
                    direct[at, step, j] += strength * (f - target)
            for j in range(N):
                spikes[step, at, j] = z[at, j]
                flat[np.uint64(end)] = j
                end += 1 if z[at, j] > zero else 0
            own_ptr[row + 2] = end
