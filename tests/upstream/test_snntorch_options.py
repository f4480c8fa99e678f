"""Every class with every constructor option, sparse and exact: what plain snnTorch returns, and its errors."""

from __future__ import annotations

import pytest
import torch
from snntorch_cases import (
    CASES,
    Case,
    assert_same,
    every_class,
    every_way,
    fires,
    observe,
    outcome,
    snntorch,
    spike_gradient,
)
from torch import nn

from snntorch import surrogate  # isort: skip, after the check that it is there
from snntorch.functional import quant  # isort: skip
from snn_sparse_plugin import sparse_mode, sparsify  # isort: skip


def per_neuron(low: float, high: float):
    """A value per neuron, in the shape this class takes."""

    def build(case: Case) -> torch.Tensor:
        count = torch.Size(case.neurons).numel()
        return torch.linspace(low, high, count).view(case.neurons)

    build.per_case = True
    return build


class SpikeModule(nn.Module):
    """A spike function that is a module: torch keeps it among the submodules."""

    def forward(self, x):
        return surrogate.fast_sigmoid(25)(x)


OPTIONS = {
    "default": {},
    "threshold": {"threshold": 0.3},
    "threshold-int": {"threshold": 1},
    "threshold-per-neuron": {"threshold": per_neuron(0.1, 0.9)},
    "learn_threshold": {"threshold": per_neuron(0.1, 0.9), "learn_threshold": True},
    "learn_threshold-scalar": {"learn_threshold": True},
    "beta-per-neuron": {"beta": per_neuron(0.3, 0.7)},
    "learn_beta": {"learn_beta": True},
    "learn_beta-per-neuron": {"beta": per_neuron(0.3, 0.7), "learn_beta": True},
    "beta-above-one": {"beta": 1.25, "learn_beta": True},
    "learn_alpha": {"learn_alpha": True},
    "alpha-per-neuron": {"alpha": per_neuron(0.91, 0.99)},
    "subtract": {"reset_mechanism": "subtract"},
    "zero": {"reset_mechanism": "zero"},
    "none": {"reset_mechanism": "none"},
    "reset_delay": {"reset_delay": False},
    "reset_delay-zero": {"reset_delay": False, "reset_mechanism": "zero"},
    "reset_delay-none": {"reset_delay": False, "reset_mechanism": "none"},
    "reset_delay-graded": {"reset_delay": False, "graded_spikes_factor": 2.0},
    "inhibition": {"inhibition": True},
    "state_quant": {"state_quant": quant.state_quant(num_bits=4, uniform=True)},
    "state_quant-exponential": {"state_quant": quant.state_quant(num_bits=3, uniform=False)},
    "state_quant-zero-centred": {
        "state_quant": quant.state_quant(num_bits=3, uniform=False, thr_centered=False)
    },
    "state_quant-reset_delay": {"state_quant": quant.state_quant(num_bits=4), "reset_delay": False},
    "graded": {"graded_spikes_factor": 2.5},
    "learn_graded": {"graded_spikes_factor": per_neuron(0.5, 2), "learn_graded_spikes_factor": True},
    "output": {"output": True},
    "no-output": {"output": False},
    "surrogate_disable": {"surrogate_disable": True},
    "fast_sigmoid": {"spike_grad": surrogate.fast_sigmoid(slope=25)},
    "straight_through": {"spike_grad": surrogate.straight_through_estimator()},
    "random-surrogate": {"spike_grad": surrogate.SSO()},
    "broken-surrogate": {"spike_grad": surrogate.LSO()},
    "custom-surrogate": {"spike_grad": surrogate.custom_surrogate(lambda x, grad, out: grad * (1 + out))},
    "module-surrogate": {"spike_grad": SpikeModule()},
    "unknown-reset": {"reset_mechanism": "halve"},
    # one class only
    "one-to-one": {"all_to_all": False, "linear_features": None, "V": per_neuron(-0.5, 0.5)},
    "one-to-one-scalar": {"all_to_all": False, "linear_features": None, "V": 0.5},
    "fixed-recurrence": {"learn_recurrent": False},
    "no-recurrence": {"linear_features": None},
    "delta_threshold": {"delta_threshold": 0.2},
    "RC": {"beta": False, "R": 5, "C": 2},
    "beta-and-R": {"R": 2.0},
    "beta-and-C": {"C": 5.0},
    "time_step": {"beta": False, "R": 5.0, "C": 2.0, "time_step": 0.5},
    "neither-beta-nor-RC": {"beta": False, "R": False},
    "alpha-below-beta": {"alpha": 0.5},
    "bias": {"bias": False},
    "max_pool": {"max_pool": 2},
    "avg_pool": {"avg_pool": 2},
    "both-pools": {"max_pool": 2, "avg_pool": 2},
    "kernel_truncation": {"kernel_truncation_steps": 2},
    "no-projection": {"use_q_projection": False},
    "dropout": {"dropout": 0.5},
    "dense-hidden": {"weight_hh_enable": True, "learn_beta": True},
}
# what snnTorch 1.0 cannot build or run; everything else that a class's signature knows has to work
BROKEN = {
    "Alpha": {"beta-above-one", "learn_alpha", "alpha-below-beta"},
    "Lapicque": {"beta-per-neuron", "learn_beta-per-neuron", "neither-beta-nor-RC"},
    "RLeaky": {"no-recurrence"},
    "RSynaptic": {
        "no-recurrence",
        *("reset_delay", "reset_delay-zero", "reset_delay-none", "state_quant-reset_delay"),
    },
    "SConv2dLSTM": {"both-pools"},
}
BROKEN_EVERYWHERE = {"broken-surrogate", "unknown-reset"}

COMBINATIONS = [
    pytest.param(case, name, id=f"{case.name}-{name}")
    for case in CASES.values()
    for name, options in OPTIONS.items()
    if all(case.knows(option) for option in options)
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Inhibition"),
    pytest.mark.filterwarnings("ignore:StateLeaky. spike-related"),
    pytest.mark.filterwarnings("ignore:dropout option adds dropout"),
]


@every_way
@pytest.mark.parametrize(("case", "option"), COMBINATIONS)
def test_option(case, option, way):
    options = OPTIONS[option]
    error, theirs = outcome(lambda: observe(case.hidden(**options), case))
    assert bool(error) == (option in BROKEN.get(case.name, set()) | BROKEN_EVERYWHERE), theirs
    snntorch.SpikingNeuron.instances.clear()
    with way.on():
        failed, ours = outcome(lambda: observe(way.ready(case.hidden(way.library, **options)), case))
    assert failed == error, ours
    if error:
        assert ours == theirs
    else:
        assert_same(ours, theirs)


@every_class
def test_the_inputs_make_it_fire(case):
    assert fires(observe(case.hidden(), case))


MASKABLE = [case for case in CASES.values() if case.knows("spike_grad")]


@every_way
@pytest.mark.parametrize("case", MASKABLE, ids=[case.name for case in MASKABLE])
@pytest.mark.parametrize("function", [surrogate.atan(), SpikeModule()], ids=["closure", "module"])
def test_the_window_reaches_every_spike_function(case, function, way):
    module = way.ready(case.hidden(way.library, spike_grad=function))
    assert spike_gradient(case.hidden(spike_grad=function), case).any()
    if way.marked:
        sparsify(module, backprop_threshold=1e-6, min_active=0)
        assert not spike_gradient(module, case).any()
    else:
        with sparse_mode(backprop_threshold=1e-6, min_active=0):
            assert not spike_gradient(module, case).any()
