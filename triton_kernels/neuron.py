"""One step of the canonical neuron and its adjoint, on a block of neurons in registers.

``step`` follows ``ops/spiking_layer/reference.py`` operation by operation: launched without fused
multiply-add its spikes and membranes are bit-equal. Spec fields arrive as the strings of ``NeuronSpec``.
"""

import triton
import triton.language as tl


@triton.jit
def load_params(params_ptr, N, cols, mask):
    """mem, syn, threshold, leak and reset_value of a block, from the packed (5, N) tensor."""
    mem = tl.load(params_ptr + cols, mask=mask, other=0.0)
    syn = tl.load(params_ptr + N + cols, mask=mask, other=0.0)
    threshold = tl.load(params_ptr + 2 * N + cols, mask=mask, other=0.0)
    leak = tl.load(params_ptr + 3 * N + cols, mask=mask, other=0.0)
    reset_value = tl.load(params_ptr + 4 * N + cols, mask=mask, other=0.0)
    return mem, syn, threshold, leak, reset_value


@triton.jit
def step(
    x,
    rec,
    v,
    i,
    mem,
    syn,
    threshold,
    leak,
    reset_value,
    RECURRENT: tl.constexpr,
    UPDATE: tl.constexpr,
    SYNAPSE: tl.constexpr,
    RESET: tl.constexpr,
    TIMING: tl.constexpr,
    SCOPE: tl.constexpr,
    SPIKING: tl.constexpr,
):
    """-> (u, spikes, v, i, drive): ``drive`` is what the parameter gradients need of the input.

    drive is the previous synaptic current (decay), the current after its jump (euler) or the input (box).
    """
    s = tl.zeros_like(v)
    R = ((v - threshold) > 0).to(v.dtype)
    drive = i
    if UPDATE == "decay":
        if TIMING != "immediate" and (RESET == "zero" and SCOPE == "state"):
            v = (1.0 - R) * v
        if SYNAPSE:
            i = syn * i + x
            if RECURRENT:
                i = i + rec
            u = mem * v + i
        else:
            u = mem * v + x
            if RECURRENT:
                u = u + rec
        if TIMING != "immediate":
            if RESET == "subtract":
                u = u - R * threshold
            elif RESET == "zero" and SCOPE == "sum":
                u = u - R * u
    elif UPDATE == "euler":
        drive = i + x
        if RECURRENT:
            drive = drive + rec
        u = v + mem * ((leak - v) + drive)
        i = drive + -syn * drive
    else:
        drive = x
        if RECURRENT:
            drive = drive + rec
        u = v + mem * (drive + leak - v)

    v = u
    if SPIKING:
        s = ((u - threshold) > 0).to(u.dtype)
        if RESET != "none":
            if TIMING == "corrected":
                z = s - R
                v = u - z * (threshold if RESET == "subtract" else u)
            elif TIMING == "immediate":
                if RESET == "subtract":
                    v = (1.0 - s) * u + s * (u - threshold)
                elif RESET == "value":
                    v = (1.0 - s) * u + s * reset_value
                else:
                    v = (1.0 - s) * u + s * 0.0
    return u, s, v, i, drive


@triton.jit
def adjoint(
    g_s,
    g_v,
    g_i,
    phi,
    u,
    v_prev,
    drive,
    mem,
    syn,
    threshold,
    leak,
    reset_value,
    UPDATE: tl.constexpr,
    SYNAPSE: tl.constexpr,
    RESET: tl.constexpr,
    TIMING: tl.constexpr,
    SCOPE: tl.constexpr,
    ATTACHED: tl.constexpr,
    SPIKING: tl.constexpr,
):
    """Transpose of ``step``: gradients of what leaves it -> nu, v and i before it, and the five parameters.

    ``phi`` is the surrogate derivative at u - threshold, zero outside the window.
    """
    zero = tl.zeros_like(u)
    s = ((u - threshold) > 0).to(u.dtype)
    R = ((v_prev - threshold) > 0).to(u.dtype)  # detached
    d_syn, d_threshold, d_leak, d_reset_value = zero, zero, zero, zero

    # firing and the reset after it: v = reset(u, z)
    lam = g_v
    if SPIKING:
        gs = g_s
        if RESET != "none" and TIMING != "delayed":
            z = s
            if TIMING == "corrected":
                z = s - R
            if RESET == "subtract":
                dv_dz = -threshold
                d_threshold = -z * g_v
            else:
                lam = (1.0 - z) * g_v
                dv_dz = -u
                if RESET == "value":
                    dv_dz = reset_value - u
                    d_reset_value = z * g_v
            if ATTACHED:
                gs = gs + dv_dz * g_v
        lam = lam + phi * gs
        d_threshold = d_threshold - phi * gs

    # the update: u = f(v_prev, i_prev, x)
    if UPDATE == "decay":
        v_used = v_prev
        dv = mem * lam
        if TIMING != "immediate":
            if RESET == "subtract":
                d_threshold = d_threshold - R * lam
            elif RESET == "zero":
                dv = (1.0 - R) * dv
                if SCOPE == "sum":
                    lam = (1.0 - R) * lam
                else:
                    v_used = (1.0 - R) * v_prev
        d_mem = lam * v_used
        nu = lam
        di = zero
        if SYNAPSE:
            nu = lam + g_i
            d_syn = nu * drive
            di = syn * nu
    else:
        dv = lam - mem * lam
        d_leak = mem * lam
        nu = mem * lam
        di = zero
        if UPDATE == "euler":
            d_mem = lam * ((leak - v_prev) + drive)
            d_syn = -drive * g_i
            nu = nu + (g_i - syn * g_i)
            di = nu
        else:
            d_mem = lam * (drive + leak - v_prev)
    return nu, dv, di, d_mem, d_syn, d_threshold, d_leak, d_reset_value
