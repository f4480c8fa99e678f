"""Norse's neurons in our terms: its activation functions -> the canonical family, or equations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..core.dynamics import NeuronParams, NeuronSpec
from ..core.equations import Equations
from ..core.surrogates import Surrogate
from .base import Neuron
from .norse_equations import (
    CONDUCTANCE,
    IZHIKEVICH,
    LI_BOX,
    LIF_ADEX,
    LIF_EX,
    PLAIN,
    REFRACTORY,
    adaptive_lif,
    refractory_lif,
)
from .norse_surrogates import surrogate_of


@cache
def _equations(text: str, states: str, inputs: str = "x") -> Equations:
    return Equations(text, tuple(states.split()), inputs=tuple(inputs.split()))


def _rates(module: Any, p: Any) -> dict[str, Any]:
    return {
        "mem": module.dt * p.tau_mem_inv,
        "syn": module.dt * p.tau_syn_inv,
        "leak": p.v_leak,
        "threshold": p.v_th,
        "reset": p.v_reset,
    }


def _exponential(module: Any, p: Any) -> dict[str, Any]:
    return {**_rates(module, p), "delta": p.delta_T}


def _adaptive_exponential(module: Any, p: Any) -> dict[str, Any]:
    return {
        **_exponential(module, p),
        "adaptation": module.dt * p.tau_ada_inv,
        "coupling": p.adaptation_current,
        "jump": p.adaptation_spike,
    }


def _adaptive_threshold(module: Any, p: Any) -> dict[str, Any]:
    return {**_rates(module, p), "adaptation": module.dt * p.tau_adapt_inv, "jump": p.beta}


def _izhikevich(module: Any, p: Any) -> dict[str, Any]:
    return {
        "rate": p.tau_inv * module.dt,
        "square": p.sq,
        "linear": p.mn,
        "bias": p.bias,
        "recovery": p.tau_inv * module.dt * p.a,
        "coupling": p.b,
        "threshold": p.v_th,
        "reset": p.c,
        "jump": p.d,
    }


Build = Callable[[Any], "Neuron | str"]


def _by_equations(
    text: str,
    states: str,
    params: Callable[[Any, Any], dict[str, Any]],
    *,
    recurrent: bool,
    inner: str = "",
    spiking: bool = True,
) -> Build:
    """``inner``: the field of ``module.p`` that holds the parameters of the neuron inside a refractory one."""

    def build(module: Any) -> Neuron | str:
        p = getattr(module.p, inner) if inner else module.p
        surrogate = surrogate_of(p.method, p.alpha) if spiking else Surrogate("zero")
        if isinstance(surrogate, str):
            return surrogate
        values = params(module, p)
        if inner:
            values["rho_reset"] = module.p.rho_reset
        weights = {}
        if recurrent:
            weights = {"input_weight": module.input_weights, "recurrent_weight": module.recurrent_weights}
        return Neuron(_equations(text, states), values, surrogate, **weights)

    return build


def _lif(module: Any, *, recurrent: bool) -> Neuron | str:
    p = module.p
    surrogate = surrogate_of(p.method, p.alpha)
    if isinstance(surrogate, str):
        return surrogate
    weights = {}
    if recurrent:
        weights = {"input_weight": module.input_weights, "recurrent_weight": module.recurrent_weights}
    return Neuron(
        NeuronSpec("euler", True, "value", "immediate", attached=not recurrent),
        NeuronParams(module.dt * p.tau_mem_inv, module.dt * p.tau_syn_inv, p.v_th, p.v_leak, p.v_reset),
        surrogate,
        **weights,
    )


def _box(module: Any) -> Neuron | str:
    p = module.p
    norse = import_module("norse.torch")
    resets: dict[Any, Any] = {norse.reset_value: "value", norse.reset_subtract: "subtract"}
    surrogate = surrogate_of(p.method, p.alpha)
    if p.reset_method not in resets:
        return f"its reset_method {getattr(p.reset_method, '__name__', p.reset_method)} is a Python function"
    if isinstance(surrogate, str):
        return surrogate
    return Neuron(
        NeuronSpec("box", False, resets[p.reset_method], "immediate", attached=True),
        NeuronParams(module.dt * p.tau_mem_inv, 0.0, p.v_th, p.v_leak, p.v_reset),
        surrogate,
    )


def _iaf(module: Any) -> Neuron | str:
    p = module.p
    surrogate = surrogate_of(p.method, p.alpha)
    if isinstance(surrogate, str):
        return surrogate
    spec = NeuronSpec("decay", False, "value", "immediate", attached=True)
    return Neuron(spec, NeuronParams(1.0, 0.0, p.v_th, 0.0, p.v_reset), surrogate)


def readout(module: Any) -> Neuron:
    """The leaky integrator of LI, LICell and LILinearCell."""
    p = module.p
    return Neuron(
        NeuronSpec("euler", True, "none", spiking=False),
        NeuronParams(module.dt * p.tau_mem_inv, module.dt * p.tau_syn_inv, leak=p.v_leak),
    )


def _box_readout(module: Any) -> Neuron:
    values = {"mem": module.dt * module.p.tau_mem_inv, "leak": module.p.v_leak}
    return Neuron(_equations(LI_BOX, "v"), values)


def _linear_readout(module: Any) -> Neuron:
    return replace(readout(module), input_weight=module.input_weights)


def _conductances(module: Any) -> Neuron | str:
    """CobaLIFCell: positive weights excite, negative ones inhibit."""
    p, recurrent = module.p, module.recurrent_weights
    surrogate = surrogate_of(p.method, p.alpha)
    if isinstance(surrogate, str):
        return surrogate

    def split(weights: Tensor) -> Tensor:
        return torch.cat([torch.relu(weights), torch.relu(-weights)])

    weights = module.input_weights
    values = {
        "mem": module.dt * p.c_m_inv,
        "syn_exc": module.dt * p.tau_syn_exc_inv,
        "syn_inh": module.dt * p.tau_syn_inh_inv,
        "leak": p.g_l,
        "rest": p.v_rest,
        "e_rev_E": p.e_rev_E,
        "e_rev_I": p.e_rev_I,
        "threshold": p.v_thresh,
        "reset": p.v_reset,
    }
    return Neuron(
        _equations(CONDUCTANCE, "v g_e g_i", "exc inh"),
        values,
        surrogate,
        input_weight=split(weights)
        if _reads_input()
        else weights.new_zeros(2 * len(weights), weights.shape[1]),
        recurrent_weight=split(recurrent),
    )


@cache
def _reads_input() -> bool:
    """Norse 1.1's coba_lif_step overwrites what its input did to the conductances: look instead of at the version."""
    f = import_module("norse.torch.functional.coba_lif")
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    with torch.no_grad():
        _, state = f.coba_lif_step(one, f.CobaLIFState(zero, zero, zero, zero), one, one)
    return bool(state.g_e > 0)


@cache
def builders() -> dict[Any, Build]:
    """Upstream's activation function, or a class without one -> what makes our :class:`Neuron` of such a module."""
    f = import_module("norse.torch")

    def functional(name: str) -> Any:
        return import_module(f"norse.torch.functional.{name}")

    table: dict[Any, Build] = {
        f.lif_feed_forward_step: lambda module: _lif(module, recurrent=False),
        f.lif_step: lambda module: _lif(module, recurrent=True),
        f.lif_box_feed_forward_step: _box,
        f.iaf_feed_forward_step: _iaf,
        f.li_feed_forward_step: readout,
        f.LILinearCell: _linear_readout,
        f.CobaLIFCell: _conductances,
        functional("leaky_integrator_box").li_box_feed_forward_step: _box_readout,
    }
    for recurrent, ending in ((False, "_feed_forward_step"), (True, "_step")):
        for name, text, states, params, inner in (
            ("lif_ex", LIF_EX + PLAIN, "v i", _exponential, ""),
            ("lif_adex", LIF_ADEX + PLAIN, "v i a", _adaptive_exponential, ""),
            ("lif_refrac", refractory_lif(recurrent), "v i rho", _rates, "lif"),
            ("lif_adex_refrac", LIF_ADEX + REFRACTORY, "v i a rho", _adaptive_exponential, "lif_adex"),
            ("lsnn", adaptive_lif(recurrent), "v i b", _adaptive_threshold, ""),
        ):
            table[getattr(functional(name), name + ending)] = _by_equations(
                text, states, params, recurrent=recurrent, inner=inner
            )
    for recurrent, name in ((False, "izhikevich_feed_forward_step"), (True, "izhikevich_recurrent_step")):
        activation = getattr(functional("izhikevich"), name)
        table[activation] = _by_equations(IZHIKEVICH, "v u", _izhikevich, recurrent=recurrent)
    return table


# upstream's class or activation function -> why it is in no fused family
WHY_NOT = {
    "LIFMCRecurrentCell": "its compartments are coupled by a matrix",
    "LIFMCRefracRecurrentCell": "its compartments are coupled by a matrix",
    "LIFCorrelation": "it also runs correlation sensors",
}
