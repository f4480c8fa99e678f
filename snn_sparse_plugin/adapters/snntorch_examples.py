"""How to build every neuron class of snnTorch: the rows of the table of supported neurons."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from .base import Example


def examples() -> dict[str, Example]:
    """See :meth:`Adapter.examples`."""
    snn = import_module("snntorch")
    options: dict[str, Any] = {
        **{"learn_beta": True, "learn_threshold": True},
        **{f"reset_mechanism={name}": name for name in ("subtract", "zero", "none")},
        **{"state_quant": lambda x: x, "inhibition": True, "surrogate_disable": True},
    }
    graded = {"graded_spikes_factor": 0.5, "learn_graded_spikes_factor": True}
    full = {**options, "reset_delay": False, **graded}
    convolution = {"linear_features": None, "conv2d_channels": 4, "kernel_size": 3}
    recurrent = {**full, "all_to_all": False, "learn_recurrent": False, "conv2d_channels": convolution}
    whole = {"learn_beta": True, "learn_threshold": True, "surrogate_disable": True, **graded}
    convolved = {**whole, "output": False, "state_quant": lambda x: x, "kernel_truncation_steps": 3}
    return {
        "Leaky": Example(partial(_made, snn.Leaky, beta=0.9), full),
        "Synaptic": Example(partial(_made, snn.Synaptic, alpha=0.9, beta=0.8), {**full, "learn_alpha": True}),
        "RLeaky": Example(partial(_made, snn.RLeaky, beta=0.9, linear_features=4), recurrent),
        "RSynaptic": Example(
            partial(_made, snn.RSynaptic, alpha=0.9, beta=0.8, linear_features=4), recurrent
        ),
        "Alpha": Example(partial(_made, snn.Alpha, alpha=0.9, beta=0.8), options),
        "Lapicque": Example(partial(_made, snn.Lapicque, beta=0.9), options),
        "DeltaLeaky": Example(partial(_made, snn.DeltaLeaky, beta=0.9), full),
        "StateLeaky": Example(
            partial(_made, snn.StateLeaky, beta=0.9, channels=4),
            convolved,
            "up to the rounding of a convolution",
        ),
        "LinearLeaky": Example(
            partial(_made, snn.LinearLeaky, beta=0.9, in_features=4, out_features=4),
            convolved,
            "up to the rounding of a convolution",
        ),
        "LeakyParallel": Example(
            partial(_made, snn.LeakyParallel, input_size=4, hidden_size=4, beta=0.9),
            {**whole, "bias": False, "weight_hh_enable": True},
            "up to the rounding of torch's RNN",
        ),
        "AssociativeLeaky": Example(
            partial(_made, snn.AssociativeLeaky, 4, 2, 2, 4),
            {"use_q_projection": False},
            "up to the rounding of a cumulative sum",
        ),
        "SLSTM": Example(partial(_made, snn.SLSTM, 4, 4)),
        "SConv2dLSTM": Example(partial(_made, snn.SConv2dLSTM, 1, 2, 3)),
    }


def _made(cls: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if options.get("all_to_all") is False:
        options.pop("linear_features")
    options |= options.pop("conv2d_channels", {})
    neuron = cls(*args, **options)
    instances = import_module("snntorch").SpikingNeuron.instances
    # snnTorch keeps every neuron ever made, and one DeltaLeaky among them breaks utils.reset for all
    instances[:] = [other for other in instances if other is not neuron]
    return neuron
