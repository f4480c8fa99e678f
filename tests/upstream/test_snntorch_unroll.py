"""unroll on every class: the step loop's outputs, hidden states and gradients, fused or not."""

from __future__ import annotations

import pytest
import torch
from snntorch_cases import CASES, STEPPED, assert_same, equal, every_class, observe, snntorch, steps
from torch import nn

from snn_sparse_plugin import unroll  # isort: skip
import snn_sparse_plugin.snntorch as face  # isort: skip

OPTIONS = {
    "default": {},
    "subtract": {"reset_mechanism": "subtract"},
    "zero": {"reset_mechanism": "zero"},
    "none": {"reset_mechanism": "none"},
    "disabled": {"surrogate_disable": True},
}
COMBINATIONS = [
    pytest.param(case, options, id=f"{case.name}-{option}")
    for case in STEPPED.values()
    for option, options in OPTIONS.items()
    if case.name != "DeltaLeaky"  # returns a nested state, which nothing can follow in a sequence
]


def loop(net, case, x):
    outs = steps(net, case, x)
    return [torch.stack([out[0] for out in outs]), torch.stack([out[-1] for out in outs])]


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "stepped"])
@pytest.mark.parametrize("library", [snntorch, face], ids=["upstream", "face"])
@pytest.mark.parametrize(("case", "options"), COMBINATIONS)
def test_stepped_neuron(case, options, library, fuse):
    def run(net, case, x):
        out = unroll(net, x, backprop_threshold=None, fuse_time=fuse)
        return [out.spikes, out.mem]

    theirs = observe(nn.Sequential(case.hidden(output=True, **options)), case, loop)
    ours = observe(nn.Sequential(case.hidden(library, output=True, **options)), case, run)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].sequence])
@pytest.mark.parametrize("library", [snntorch, face], ids=["upstream", "face"])
@pytest.mark.parametrize("disabled", [False, True], ids=["default", "disabled"])
def test_sequence_neuron(name, library, disabled):
    case = CASES[name]
    options = {"surrogate_disable": True} if disabled and case.knows("surrogate_disable") else {}

    def run(net, case, x):
        return [unroll(net, x, backprop_threshold=None).spikes]

    def first(net, case, x):
        out = net(x)
        return [out[0] if isinstance(out, tuple) else out]

    theirs = observe(nn.Sequential(case.build(**options)), case, first)
    ours = observe(nn.Sequential(case.build(library, **options)), case, run)
    assert_same(ours, theirs)


@every_class
def test_the_face_unrolls_like_upstreams_class(case):
    """Also with the default window and guard."""
    net, twin = (nn.Sequential(case.hidden(library)) for library in (snntorch, face))
    if case.name == "DeltaLeaky":
        pytest.skip("returns a nested state")
    x = case.inputs()
    assert equal(unroll(net, x).spikes, unroll(twin, x).spikes)
