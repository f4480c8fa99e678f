"""A step of e-prop's kernels against autograd through the specification; also under the interpreter and on a device."""

import itertools

import pytest
import torch

from snn_sparse_plugin import ConfigError, Surrogate
from snn_sparse_plugin.adapters.base import Neuron
from snn_sparse_plugin.core.dynamics import RESETS, SCOPES, TIMINGS, UPDATES, NeuronParams, NeuronSpec
from snn_sparse_plugin.core.equations import Equations
from snn_sparse_plugin.core.programs import step as equations_step
from snn_sparse_plugin.learners.eprop import lsnn
from snn_sparse_plugin.learners.eprop.stepper import Stepper
from snn_sparse_plugin.ops.spiking_layer import reference

B, SIZE = 3, 19


def family():
    for update, synapse, reset, timing, scope, attached, spiking in itertools.product(
        UPDATES, (False, True), RESETS, TIMINGS, SCOPES, (False, True), (False, True)
    ):
        try:
            spec = NeuronSpec(update, synapse, reset, timing, scope, attached, spiking)
        except ConfigError:
            continue
        if timing == "immediate" and scope == "sum":
            continue  # which says something of the other two alone
        yield spec


def name_of(spec):
    return "-".join(
        str(x) for x in (spec.update, "syn" * spec.synapse, spec.reset, spec.timing, spec.scope, "att" * spec.attached,
                         "" if spec.spiking else "readout") if x
    )  # fmt: skip


def params(spec, dtype, per_neuron, device):
    def value(x):
        value = x + 0.1 * torch.rand(SIZE, dtype=dtype) if per_neuron else torch.tensor(x, dtype=dtype)
        return value.to(device)

    if isinstance(spec, NeuronSpec):
        return NeuronParams(*(value(x) for x in (0.8, 0.6, 0.5, 0.1, -0.2)))
    known = {"delta": 0.5, "refractory": 2.0, "v_th": 0.4, "rho_reset": 2.0}
    return {name: value(known.get(name, 0.3)) for name in spec.program.params}


def states_of(spec):
    return spec.states if isinstance(spec, Equations) else ("v", "i") if spec.synapse else ("v",)


def by_autograd(spec, values, surrogate, x, rec, states):
    """What the specification makes of a step, and its derivatives by (row, column)."""
    leaves = [x.clone().requires_grad_(), *(s.clone().requires_grad_() for s in states)]
    if isinstance(spec, Equations):
        packed = torch.stack([values[n].expand(SIZE) for n in spec.program.params])
        names = dict(zip(spec.states, leaves[1:], strict=True))
        _, s, after = equations_step(spec.program, names, leaves[0], rec, packed, surrogate)
        rows = [s, *after.values()]
    else:
        packed = torch.stack([v.expand(SIZE) for v in values])
        i = leaves[2] if spec.synapse else None
        _, s, v, i = reference.step(spec, packed, leaves[0], rec, leaves[1], i, surrogate)
        rows = [s, v] if i is None else [s, v, i]
    found = {}
    for r, row in enumerate(rows):
        grads = (
            torch.autograd.grad(row, leaves, torch.ones_like(row), allow_unused=True, retain_graph=True)
            if row.requires_grad
            else [None] * len(leaves)
        )
        for c, grad in enumerate(grads):
            found[r, c] = torch.zeros_like(x) if grad is None else grad
    return [row.detach() for row in rows], found


def compare(spec, surrogate, dtype, recurrent=False, per_neuron=False, exact=True, device="cpu"):
    """Spikes, states and every derivative of a step against autograd through the specification."""
    torch.manual_seed(0)
    values = params(spec, dtype, per_neuron, device)
    weight = torch.zeros(SIZE, SIZE, dtype=dtype, device=device) if recurrent else None
    neuron = Neuron(spec, values, surrogate, recurrent_weight=weight)
    names = states_of(spec)
    states = [torch.randn(B, SIZE, dtype=dtype, device=device) for _ in names]
    x, rec = torch.randn(2, B, SIZE, dtype=dtype, device=device).unbind(0)
    states[0][0, :4] = torch.as_tensor(getattr(values, "threshold", 0.5)).to(x).expand(SIZE)[:4]  # ties
    rec = rec if recurrent else None
    rows, expected = by_autograd(spec, values, surrogate, x, rec, states)
    readout = not spec.spiking
    stepper = Stepper(neuron, names, readout, states[0], steps=2)
    stepper.step(x + 1, rec, states)  # the derivatives of another step stand before
    spikes, output, after, place = stepper.step(x, rec, states)
    assert output is (after[0] if readout else spikes)
    for own, row in zip([spikes, *after], rows, strict=True):
        assert torch.equal(own, row) if exact else torch.allclose(own, row, rtol=1e-12, atol=1e-12)
    local = place.part(1).local
    bound = 1e-12 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
    matters = {k for pair in local for k in pair}
    for pair, grad in expected.items():
        if pair[0] not in matters:  # a state that the output never comes to depend on
            continue
        found = torch.as_tensor(local.get(pair, 0.0), dtype=dtype, device=device).expand(1, B, SIZE)[0]
        assert float((found - grad).abs().max()) <= bound * max(1.0, float(grad.abs().max())), pair
    return matters


FEW = {
    "subtract": (NeuronSpec(), False),
    "synapse-zero-recurrent": (NeuronSpec(synapse=True, reset="zero", scope="sum"), True),
    "euler-attached": (NeuronSpec("euler", True, "value", "immediate", attached=True), False),
    "readout": (NeuronSpec("euler", True, "none", spiking=False), False),
    "lsnn": (lsnn._EQUATIONS, True),
}


class StepTests:
    """By Triton; a subclass says where."""

    device: str

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", FEW)
    def test_equals_autograd(self, name, dtype, monkeypatch):
        monkeypatch.setattr("snn_sparse_plugin.learners.eprop.stepper.on_triton", lambda x: True)
        spec, recurrent = FEW[name]
        compare(
            spec, Surrogate("fast_sigmoid", (5.0,)), dtype, recurrent, per_neuron=True, device=self.device
        )
