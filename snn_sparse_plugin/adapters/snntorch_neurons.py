"""snnTorch's neurons beyond the canonical family, as equations in its order of operations.

Resets are delayed and detached in all of them: ``above`` of the membrane before the step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..core.dynamics import NeuronParams, NeuronSpec
from ..core.equations import Equations
from ..core.host import known
from ..core.spikes import SpikeTrain
from .hooks import has_hooks

# classes that are run step by step, with their states in the order of their forward's arguments
STATES: dict[str, tuple[str, ...]] = {
    "Leaky": ("mem",),
    "Lapicque": ("mem",),
    "Synaptic": ("syn", "mem"),
    "Alpha": ("syn_exc", "syn_inh", "mem"),
    "RLeaky": ("spk", "mem"),
    "RSynaptic": ("spk", "syn", "mem"),
}

_ALPHA = """
r = above(mem - threshold)
e = alpha * syn_exc + x
h = beta * syn_inh - x
u = tau * (e + h)
"""
_ALPHA_RESETS = {
    "subtract": "u = u - (-syn_inh) * r\nsyn_exc = e - threshold * r\nsyn_inh = h - h * r\nmem = u\n",
    "zero": "syn_exc = e - e * r\nsyn_inh = h - h * r\nmem = u - u * r\n",
    "none": "syn_exc = e\nsyn_inh = h\nmem = u\n",
}
_LAPICQUE = """
r = above(mem - threshold)
u = x * R * conductance * dt + decay * mem
"""
_LAPICQUE_RESETS = {"subtract": "mem = u - r * threshold\n", "zero": "mem = u - r * u\n", "none": "mem = u\n"}
_FIRE = "s = spike(mem - threshold)\n"
# fires where the membrane has moved by more than a threshold; nothing resets
_DELTA = """
u = beta * mem + x
s = spike(abs(u - mem) - delta_threshold)
mem_prev = mem
mem = u
"""
# the entry (i, j) of a matrix: value_i key_j is written, and sigmoid(decay_j), written with exponents that are never
# positive, forgets. As upstream, the writes are divided by the product of all factors, summed, and multiplied by it
_ASSOCIATIVE = """
low = decay - relu(decay)
factor = exp(low) / (exp(low) + exp(-relu(decay)))
kept = kept * (eps + relu(factor - eps))
written = written + value * key * (1 / (kept + 1e-8))
mem = written * kept
"""
# torch's RNN with a diagonal recurrent matrix
_PARALLEL = "mem = relu(x + beta * mem)\ns = spike(mem - threshold)\n"


@cache
def _equations(text: str, states: str, inputs: str = "x") -> Equations:
    return Equations(text, tuple(states.split()), membrane="mem", inputs=tuple(inputs.split()))


Parts = dict[str, Any]
"""What of :class:`~snn_sparse_plugin.adapters.Neuron` the class decides."""


def describe_alpha(module: Any, reset: str) -> Parts | str:
    """The second-order neuron: an excitatory and an inhibitory current, read by the membrane."""
    a, b = module.alpha.clamp(0, 1), module.beta.clamp(0, 1)
    tau = torch.log(a) / (torch.log(b) - torch.log(a)) + 1
    return {
        "spec": _equations(_ALPHA + _ALPHA_RESETS[reset] + _FIRE, "syn_exc syn_inh mem"),
        "params": {"alpha": a, "beta": b, "tau": tau, "threshold": module.threshold},
    }


def describe_lapicque(module: Any, reset: str) -> Parts | str:
    """The RC circuit, discretised by the forward Euler method."""
    rc = module.R * module.C
    params = {
        "R": module.R,
        "conductance": 1 / rc,
        "dt": module.time_step,
        "decay": 1 - module.time_step / rc,
        "threshold": module.threshold,
    }
    return {"spec": _equations(_LAPICQUE + _LAPICQUE_RESETS[reset] + _FIRE, "mem"), "params": params}


def describe_delta(module: Any) -> Parts | str:
    """Fires on changes of the membrane."""
    return {
        "spec": _equations(_DELTA, "mem mem_prev"),
        "params": {"beta": module.beta, "delta_threshold": module.delta_threshold},
    }


def describe_state(module: Any) -> Parts | str:
    """StateLeaky and LinearLeaky: a causal convolution with an exponential, which is a recursion."""
    if module.kernel_truncation_steps is not None:
        return "kernel_truncation_steps cuts the exponential off"
    parts: Parts = {
        "spec": NeuronSpec(reset="none", spiking=bool(module.output)),
        "params": NeuronParams(torch.exp(-1 / module.tau), threshold=module.threshold),
    }
    linear = getattr(module, "linear", None)
    if linear is not None:
        if type(linear).forward is not nn.Linear.forward or has_hooks(linear):
            return "its linear layer was replaced or has hooks"
        parts |= {"input_weight": linear.weight, "input_bias": linear.bias}
    return parts


def describe_associative(module: Any) -> Parts | str:
    """AssociativeLeaky: d x n neurons of three inputs, each the row of a small projection that several share."""
    projections = [
        module.to_v,
        module.to_k,
        module.to_alpha,
        *([module.to_q] if module.use_q_projection else []),
    ]
    if any(type(p).forward is not nn.Linear.forward or has_hooks(p) for p in projections):
        return "its projections were replaced or have hooks"
    d, n = module.d_value, module.d_key

    def rows(name: str) -> Tensor:
        value, key, decay = (getattr(p, name) for p in projections[:3])
        others = (1,) * (value.dim() - 1)
        return torch.cat([value.repeat_interleave(n, 0), key.repeat(d, *others), decay.repeat(d, *others)])

    def read(spikes: Tensor, x: Tensor | SpikeTrain) -> Tensor:
        query = module.to_q(x.to_dense() if isinstance(x, SpikeTrain) else x)
        return (spikes.unflatten(-1, (d, n)) @ query.unflatten(-1, (n, d))).flatten(-2)

    parts: Parts = {
        "spec": _equations(
            _ASSOCIATIVE + (_FIRE if module.output else ""), "written kept mem", "value key decay"
        ),
        "params": {"eps": module.eps} | ({"threshold": module.threshold} if module.output else {}),
        "input_weight": rows("weight"),
    }
    if module.to_v.bias is not None:
        parts["input_bias"] = rows("bias")
    return parts | ({"output": read} if module.use_q_projection else {})


def describe_parallel(module: Any) -> Parts | str:
    """LeakyParallel: a ReLU RNN whose recurrent matrix is diagonal unless the user made it dense."""
    rnn = module.rnn
    plain = type(rnn) is nn.RNN and (rnn.nonlinearity, rnn.num_layers) == ("relu", 1)
    if not plain or rnn.bidirectional or rnn.batch_first or has_hooks(rnn):
        return "its RNN was replaced or has hooks"
    weight: Tensor = rnn.weight_hh_l0
    diagonal = weight.diagonal()
    if weight.requires_grad and not weight._backward_hooks:
        return "its recurrent matrix is learned as a whole (weight_hh_enable)"
    if not known(weight, _is_diagonal):
        return "its recurrent matrix is not diagonal"
    parts: Parts = {
        "spec": _equations(_PARALLEL, "mem"),
        "params": {"beta": diagonal, "threshold": module.threshold},
        "input_weight": rnn.weight_ih_l0,
    }
    if rnn.bias:
        parts["input_bias"] = rnn.bias_ih_l0 + rnn.bias_hh_l0
    return parts


def _is_diagonal(weight: Tensor) -> bool:
    return torch.equal(weight.detach(), weight.detach().diagonal().diag_embed())


class Absent:
    """Stands for a class that the installed snnTorch does not have: nothing is an instance of it."""


class Classes:
    """snnTorch's classes by name; older versions lack some."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_snntorch(), name, Absent)


@cache
def _snntorch() -> Any:
    return import_module("snntorch")


@cache
def _sequence_classes() -> tuple[type, ...]:
    snn = Classes()
    return snn.StateLeaky, snn.AssociativeLeaky, snn.LeakyParallel


def takes_sequence(cls: type) -> bool:
    """Whether the forward of this class takes all steps at once."""
    return issubclass(cls, _sequence_classes())


# a compiled graph takes the answer for a constant, as torch.compiler.assume_constant_result would make it
takes_sequence._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def builders() -> dict[type, tuple[Callable[..., Parts | str], bool]]:
    """Class -> (what describes it, whether that takes the reset mechanism)."""
    snn = Classes()
    return {
        snn.Alpha: (describe_alpha, True),
        snn.Lapicque: (describe_lapicque, True),
        snn.DeltaLeaky: (describe_delta, False),
        snn.LinearLeaky: (describe_state, False),
        snn.StateLeaky: (describe_state, False),
        snn.AssociativeLeaky: (describe_associative, False),
        snn.LeakyParallel: (describe_parallel, False),
    }


WHY_NOT = {
    "SLSTM": "an LSTM cell makes its membrane",
    "SConv2dLSTM": "a convolutional LSTM cell makes its membrane",
}
