"""The equations of Norse's neurons beyond the canonical family, in Norse's order of operations."""

from __future__ import annotations

# the exponential term, and for AdEx the adaptation current a, which jumps with every spike
LIF_EX = """
j = i + x + rec
u = v + mem * (leak - v + delta * exp((v - threshold) / delta) + j)
i = j + -syn * j
z = spike(u - threshold)
w = (1 - z) * u + z * reset
"""
LIF_ADEX = """
j = i + x + rec
u = v + mem * (leak - v + delta * exp((v - threshold) / delta) + j - a)
i = j + -syn * j
b = a + adaptation * (coupling * (v - leak) - a)
z = spike(u - threshold)
w = (1 - z) * u + z * reset
a = b + z * jump
"""
PLAIN = "v = w\ns = z\n"
# while the counter rho is above zero the membrane keeps its value and spikes are suppressed
REFRACTORY = """
m = spike(rho)
v = (1 - m) * w + m * v
s = (1 - m) * z
rho = (1 - s) * relu(rho - m) + s * rho_reset
"""
IZHIKEVICH = """
y = v + rate * (square * (v * v) + linear * v + bias - u + x + rec)
w = u + recovery * (coupling * v - u)
s = spike(y - threshold)
v = (1 - s) * y + s * reset
u = (1 - s) * w + s * (w + jump)
"""
# excitatory and inhibitory conductances, each with an input of its own
CONDUCTANCE = """
e = g_e + exc + rec_exc
i = g_i + inh + rec_inh
g_e = e + -syn_exc * e
g_i = i + -syn_inh * i
u = v + mem * (leak * (rest - v) + g_e * (e_rev_E - v) + g_i * (e_rev_I - v))
s = spike(u - threshold)
v = (1 - s) * u + s * reset
"""
LI_BOX = "v = v + mem * ((leak - v) + x)\n"


def refractory_lif(recurrent: bool) -> str:
    r = "detach(z)" if recurrent else "z"  # Norse detaches the reset of its recurrent layers
    return f"""
    j = i + x + rec
    u = v + mem * ((leak - v) + j)
    i = j + -syn * j
    z = spike(u - threshold)
    w = (1 - {r}) * u + {r} * reset
    {REFRACTORY}"""


def adaptive_lif(recurrent: bool) -> str:
    """LSNN: an adaptive threshold b; the input acts one step later."""
    r = "detach(s)" if recurrent else "s"
    return f"""
    u = v + mem * ((leak - v) + i)
    j = i + -syn * i
    c = b + adaptation * (threshold - b)
    s = spike(u - c)
    v = (1 - {r}) * u + {r} * reset
    b = c + {r} * jump
    i = j + x + rec
    """
