"""The triton backend against the reference, the same cases under the interpreter and on a device.

Weights are multiples of 2^-8 and inputs 0 or 1, so every order of summation gives the same current: spikes
and membranes must be bit-equal, gradients equal to rounding.
"""

from itertools import product

import pytest
import torch
from helpers import some

from snn_sparse_plugin.backends import calls, select
from snn_sparse_plugin.backends.triton import TritonBackend
from snn_sparse_plugin.core import tally
from snn_sparse_plugin.core.dynamics import RESETS, SCOPES, TIMINGS, NeuronParams, NeuronSpec, NeuronState
from snn_sparse_plugin.core.errors import ConfigError, UnsupportedError
from snn_sparse_plugin.core.spikes import SpikeTrain
from snn_sparse_plugin.core.surrogates import Surrogate
from snn_sparse_plugin.ops.spiking_layer import spiking_layer
from snn_sparse_plugin.ops.spiking_layer.library import spiking_layer_op

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

UPDATES = {
    "leaky": {"update": "decay"},
    "synaptic": {"update": "decay", "synapse": True},
    "euler": {"update": "euler", "synapse": True},
    "box": {"update": "box"},
}


def all_specs():
    specs = {f"{name}-readout": NeuronSpec(**u, reset="none", spiking=False) for name, u in UPDATES.items()}
    for (name, update), reset, timing, scope, attached in product(
        UPDATES.items(), RESETS, TIMINGS, SCOPES, (False, True)
    ):
        if scope == "sum" and (reset != "zero" or timing == "immediate" or update["update"] != "decay"):
            continue  # the scope has no meaning there
        label = "-".join(
            [name, reset, timing, *(["sum"] if scope == "sum" else []), *["attached"] * attached]
        )
        try:
            specs[label] = NeuronSpec(**update, reset=reset, timing=timing, scope=scope, attached=attached)
        except ConfigError:
            continue
    return specs


SPECS = all_specs()
RECURRENT = {
    "rleaky": NeuronSpec(),
    "rsynaptic-zero": NeuronSpec(synapse=True, reset="zero", scope="sum"),
    "lif-recurrent": NeuronSpec(update="euler", synapse=True, reset="value", timing="immediate"),
    "box-attached": NeuronSpec(update="box", reset="subtract", timing="immediate", attached=True),
    "leaky-corrected": NeuronSpec(timing="corrected", attached=True),
}
SURROGATES = {
    s.kind: s
    for s in (
        Surrogate("zero"),
        Surrogate("fast_sigmoid", (25.0,)),
        Surrogate("atan", (2.0,)),
        Surrogate("sigmoid", (25.0,)),
        Surrogate("straight_through"),
        Surrogate("triangular", (0.7,)),
        Surrogate("heaviside"),
        Surrogate("spike_rate_escape", (1.5, 25.0)),
        Surrogate("sparse_fast_sigmoid", (25.0, 0.1)),
        Surrogate("triangle", (0.3,)),
        Surrogate("tanh", (3.0,)),
        Surrogate("circ", (0.5,)),
        Surrogate("erfc", (2.0,)),
    )
}
FAST_SIGMOID = SURROGATES["fast_sigmoid"]


def grid(*shape, scale, generator, dtype):
    """Random multiples of 2^-8."""
    return (torch.randn(*shape, generator=generator, dtype=dtype) * scale * 256).round() / 256


def make_inputs(spec, T, B, M, N, *, density=0.2, recurrent=False, dtype=torch.float32, device="cpu", seed=0):
    """All tensors of a layer, on the binary grid where they are summed."""
    g = torch.Generator().manual_seed(seed)
    kind = {"generator": g, "dtype": dtype}
    decay = spec.update == "decay"
    drive = 0.6 if decay else 4.0  # Norse's rates scale the input down
    tensors = {
        "x": (torch.rand(T, B, M, **kind) < density).to(dtype),
        "weight": grid(N, M, scale=drive * (5 / max(M, 1)) ** 0.5, **kind),
        "bias": grid(N, scale=0.1, **kind) + 0.125,
        "v": torch.rand(B, N, **kind) * 2 - 0.5,
        "i": torch.rand(B, N, **kind) * 0.5,
        "mem": torch.rand(N, **kind) * (0.3 if decay else 0.5) + (0.65 if decay else 0.1),
        "syn": torch.rand(N, **kind) * 0.5 + 0.3,
        "threshold": torch.rand(N, **kind) * 0.5 + 0.5,
        "leak": torch.rand(N, **kind) * 0.2 - 0.1,
        "reset_value": torch.rand(N, **kind) * 0.4 - 0.2,
    }
    if recurrent:
        tensors["recurrent_weight"] = grid(N, N, scale=drive / max(N, 1) ** 0.5, **kind)
        tensors["recurrent_bias"] = grid(N, scale=0.1, **kind)
        tensors["spikes"] = (torch.rand(B, N, **kind) < 0.5).to(dtype)
    return {name: x.to(device) for name, x in tensors.items()}


def run(backend, spec, tensors, *, dense_input=False, surrogate=FAST_SIGMOID, **options):
    """One call and its backward with random upstream gradients: -> (outputs, gradients), by name."""
    leaves = {name: x.detach().clone(memory_format=torch.preserve_format) for name, x in tensors.items()}
    for name, x in leaves.items():
        x.requires_grad_(name != "x" or dense_input)
    before = calls[backend, "forward"], calls[backend, "backward"]
    params = {name: leaves[name] for name in NeuronParams._fields}
    weights = {name: leaves.get(name) for name in ("recurrent_weight", "recurrent_bias")}
    synapses = () if dense_input else (leaves["weight"], leaves["bias"])
    out = spiking_layer(
        leaves["x"],
        *synapses,
        spec=spec,
        params=NeuronParams(**params),
        surrogate=surrogate,
        state=NeuronState(leaves["v"], leaves["i"], leaves.get("spikes")),
        backend=backend,
        **weights,
        **({"return_mem": True} | options),
    )
    outputs = {"spikes": out.spikes, "mem": out.mem, "v": out.state.v, "i": out.state.i}
    outputs = {name: x for name, x in outputs.items() if x is not None}
    backward_from_random(outputs)
    after = calls[backend, "forward"], calls[backend, "backward"]
    assert (after[0] - before[0], after[1] - before[1]) == (1, 1)  # this backend ran, and no other
    outputs = {name: x.detach() for name, x in outputs.items()}
    outputs["active_fraction"] = out.active_fraction
    return outputs, {name: x.grad for name, x in leaves.items() if x.grad is not None}


def backward_from_random(outputs):
    """Send random gradients, the same for every backend, into each output."""
    g = torch.Generator().manual_seed(1)
    loss = 0
    for x in outputs.values():
        dense = x.to_dense() if isinstance(x, SpikeTrain) else x
        upstream = torch.randn(dense.shape, generator=g, dtype=dense.dtype).to(dense.device)
        loss = loss + (dense * upstream).sum()
    loss.backward()


def assert_outputs_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, x in got.items():
        if isinstance(x, SpikeTrain):
            assert torch.equal(x.indptr, expected[name].indptr), name
            assert torch.equal(x.indices, expected[name].indices), name
        elif isinstance(x, torch.Tensor):
            different = int((x != expected[name]).sum())
            assert different == 0, f"{name}: {different} of {x.numel()} entries differ"
        else:
            assert x == expected[name], name


def assert_grads_close(got, expected):
    assert got.keys() == expected.keys()
    for name, x in got.items():
        assert x.shape == expected[name].shape, name
        error = (x - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        assert float(error) <= TOLERANCE[x.dtype], f"{name}: relative error {float(error):.2g}"


def compare(spec, tensors, **options):
    """Run both backends and compare everything; returns the reference's outputs."""
    expected, expected_grads = run("reference", spec, tensors, **options)
    got, got_grads = run("triton", spec, tensors, **options)
    assert_outputs_equal(got, expected)
    assert_grads_close(got_grads, expected_grads)
    return expected, expected_grads


class LayerTests:
    """Collected through its subclasses, one for each place the kernels run."""

    device = "cpu"

    def inputs(self, *args, **kwargs):
        return make_inputs(*args, device=self.device, **kwargs)

    def same(self, train):
        """``train(backend)`` -> (outputs, gradients) is equal for both backends."""
        (expected, expected_grads), (got, got_grads) = train("reference"), train("triton")
        assert_outputs_equal(got, expected)
        assert_grads_close(got_grads, expected_grads)

    @pytest.mark.parametrize("spec", some(SPECS))
    def test_every_neuron_of_the_family(self, spec):
        tensors = self.inputs(spec, 34, 1, 5, 5)
        tensors["x"] = tensors["x"] @ tensors["weight"].t() + tensors["bias"]
        expected, _ = compare(spec, tensors, dense_input=True, backprop_threshold=0.4, min_active=0)
        if spec.spiking:
            assert 0.02 < float(expected["spikes"].mean()) < 0.9
            assert 0 < expected["active_fraction"] < 1

    @pytest.mark.parametrize("T", [0, 1, 33, pytest.param(40, marks=pytest.mark.slow)])
    @pytest.mark.parametrize(("B", "N"), [(1, 1), (3, 63), (1, 65), (1, 130), (0, 5)])
    def test_shapes_from_events(self, T, B, N):
        spec = NeuronSpec(synapse=True)
        compare(spec, self.inputs(spec, T, B, 40, N, density=0.05), backprop_threshold=None)

    @pytest.mark.parametrize("threshold", [None, 0.2, "auto"], ids=["exact", "number", "auto"])
    @pytest.mark.parametrize("kind", SURROGATES)
    def test_every_surrogate(self, kind, threshold):
        spec = NeuronSpec(timing="immediate", attached=True)
        tensors = self.inputs(spec, 6, 2, 5, 33)
        compare(spec, tensors, surrogate=SURROGATES[kind], backprop_threshold=threshold, min_active=0)

    @pytest.mark.parametrize("events", [False, True], ids=["dense", "events"])
    @pytest.mark.parametrize("N", [pytest.param(1, marks=pytest.mark.slow), 33])
    @pytest.mark.parametrize("name", RECURRENT)
    def test_recurrent(self, name, N, events):
        spec = RECURRENT[name]
        options = {"events": True, "return_mem": False} if events else {}
        tensors = self.inputs(spec, 35, 1, 5, N, recurrent=True)
        _, grads = compare(spec, tensors, backprop_threshold=0.3, min_active=0, **options)
        assert grads["recurrent_weight"].abs().sum() > 0

    def test_recurrent_spikes_are_computed_again_where_none_were_kept(self, monkeypatch):
        backward = TritonBackend.spiking_layer_backward

        def without_events(self, call, saved, events, *rest):
            assert events is None
            assert saved.words is not None
            return backward(self, call, saved._replace(words=None), None, *rest)

        monkeypatch.setattr(TritonBackend, "spiking_layer_backward", without_events)
        spec = RECURRENT["lif-recurrent"]
        compare(spec, self.inputs(spec, 34, 2, 5, 9, recurrent=True), backprop_threshold=0.3, min_active=0)

    def test_recurrent_without_bias(self):
        tensors = self.inputs(NeuronSpec(), 6, 2, 5, 40, recurrent=True)
        del tensors["recurrent_bias"]
        compare(NeuronSpec(), tensors, backprop_threshold=None)

    @pytest.mark.parametrize("name", [pytest.param("rleaky", marks=pytest.mark.slow), "rsynaptic-zero"])
    def test_recurrent_samples_share_a_program(self, name, monkeypatch):
        from snn_sparse_plugin.triton_kernels import spiking_layer as kernels

        monkeypatch.setattr(kernels, "_READERS", 1)  # 4 samples to a program, of which there are 3
        monkeypatch.setattr(kernels, "_FED", 1)  # a launch for every 32 steps
        kernels._tile.cache_clear()
        spec = RECURRENT[name]
        try:
            compare(spec, self.inputs(spec, 34, 3, 5, 33, recurrent=True), backprop_threshold=None)
        finally:
            kernels._tile.cache_clear()

    def test_recurrent_layer_too_wide_for_one_program(self, monkeypatch):
        from snn_sparse_plugin.triton_kernels import spiking_layer as kernels

        monkeypatch.setattr(kernels, "MAX_RECURRENT", 32)
        tensors = self.inputs(NeuronSpec(), 3, 1, 5, 33, recurrent=True)
        with pytest.raises(UnsupportedError, match="up to 32 neurons, this one has 33"):
            run("triton", NeuronSpec(), tensors)

    @pytest.mark.parametrize("name", ["leaky-zero-delayed", "euler-value-immediate-attached"])
    def test_double_precision(self, name):
        spec = SPECS[name]
        tensors = self.inputs(spec, 34, 2, 5, 7, dtype=torch.float64)
        tensors["x"] = tensors["x"] @ tensors["weight"].t()
        compare(spec, tensors, dense_input=True, backprop_threshold=0.3, min_active=0)

    @pytest.mark.parametrize(("min_active", "exact"), [(0.0, False), (0.9, True)], ids=["window", "guard"])
    def test_guard_makes_a_silent_call_exact(self, min_active, exact):
        tensors = self.inputs(NeuronSpec(), 8, 2, 5, 20)
        tensors["threshold"] += 100.0  # nothing comes near
        expected, _ = compare(NeuronSpec(), tensors, backprop_threshold=0.1, min_active=min_active)
        assert expected["active_fraction"] == 0
        # with a loss on the spikes alone, the window passes nothing and the guard everything
        x = tensors["x"]
        weight = tensors["weight"].clone().requires_grad_()
        params = NeuronParams(mem=0.9, threshold=100.0)
        options = {"backprop_threshold": 0.1, "min_active": min_active, "backend": "triton"}
        spiking_layer(x, weight, params=params, **options).spikes.sum().backward()
        assert bool((weight.grad != 0).any()) == exact

    def test_strided_inputs(self):
        spec = NeuronSpec()
        tensors = self.inputs(spec, 8, 3, 20, 33, recurrent=True)
        strided = tensors | {
            "x": tensors["x"].transpose(0, 1).contiguous().transpose(0, 1),
            "weight": tensors["weight"].t().contiguous().t(),
            "bias": torch.stack([tensors["bias"]] * 2, 1)[:, 0],
            "recurrent_weight": tensors["recurrent_weight"].t().contiguous().t(),
        }
        assert not any(strided[k].is_contiguous() for k in ("x", "weight", "bias", "recurrent_weight"))
        expected, expected_grads = run("reference", spec, tensors, backprop_threshold=None)
        got, got_grads = run("triton", spec, strided, backprop_threshold=None)
        assert_outputs_equal(got, expected)
        assert_grads_close(got_grads, expected_grads)

    def test_one_input_for_all_steps(self):
        tensors = self.inputs(NeuronSpec(), 1, 3, 5, 33)
        current = tensors["x"][0] @ tensors["weight"].t() + 0.5

        def train(backend):
            leaf = current.clone().requires_grad_()
            x = leaf.expand(35, -1, -1)  # stride 0: the kernels read one slice
            spikes = spiking_layer(x, params=NeuronParams(mem=0.9), backend=backend).spikes
            backward_from_random({"spikes": spikes})
            return {"spikes": spikes}, {"x": leaf.grad}

        self.same(train)

    def test_graded_events(self):
        tensors = self.inputs(NeuronSpec(), 10, 2, 40, 33, density=0.1)
        tensors["x"] *= 0.5
        compare(NeuronSpec(), tensors, backprop_threshold=None)

    def test_without_bias_or_recorded_membrane(self):
        tensors = self.inputs(NeuronSpec(), 10, 2, 40, 33, density=0.1)

        def train(backend):
            weight = tensors["weight"].clone().requires_grad_()
            out = spiking_layer(tensors["x"], weight, params=NeuronParams(mem=0.9), backend=backend)
            assert out.mem is None
            backward_from_random({"spikes": out.spikes})
            return {"spikes": out.spikes}, {"weight": weight.grad}

        self.same(train)

    def test_no_gradient_keeps_nothing(self):
        tensors = self.inputs(NeuronSpec(), 10, 2, 40, 33, density=0.1)
        with torch.no_grad():
            outs = [
                spiking_layer(
                    tensors["x"], tensors["weight"], params=NeuronParams(mem=0.9), backend=b, events=True
                )
                for b in ("reference", "triton")
            ]
        assert_outputs_equal({"spikes": outs[1].spikes}, {"spikes": outs[0].spikes})
        assert outs[1].spikes.carrier is None

    @pytest.mark.parametrize("below", ["reference", "triton"], ids=["active-list", "dense-carrier"])
    def test_two_layers_joined_by_events(self, below):
        # the reference's train carries its gradient at active entries, this backend's densely
        first = self.inputs(NeuronSpec(), 12, 2, 20, 37, density=0.2)
        second = self.inputs(NeuronSpec(), 12, 2, 37, 34, seed=3)
        params = NeuronParams(mem=0.9, threshold=0.7)
        options = {"params": params, "backprop_threshold": 0.3, "min_active": 0}

        def train(backends):
            w1, w2 = (x["weight"].clone().requires_grad_() for x in (first, second))
            hidden = spiking_layer(first["x"], w1, events=True, backend=backends[0], **options).spikes
            assert (hidden.active is None) == (backends[0] == "triton")
            spikes = spiking_layer(hidden, w2, events=True, backend=backends[1], **options).spikes
            backward_from_random({"spikes": spikes})
            return {"hidden": hidden, "spikes": spikes}, {"w1": w1.grad, "w2": w2.grad}

        expected, expected_grads = train(("reference", "reference"))
        got, got_grads = train((below, "triton"))
        assert_outputs_equal(got, expected)
        assert_grads_close(got_grads, expected_grads)
        assert all(bool((g != 0).any()) for g in expected_grads.values())

    @pytest.mark.parametrize("density", [0.1, 0.6], ids=["events", "product"])
    @pytest.mark.parametrize("name", ["rleaky", "lif-recurrent"])
    def test_as_an_op_of_a_graph(self, name, density):
        # torch.compile's node has static shapes and lives by the checkpoints alone
        spec = RECURRENT[name]
        tensors = self.inputs(spec, 34, 1, 12, 33, density=density, recurrent=True)
        options = {"backprop_threshold": 0.3, "min_active": 0}
        expected, expected_grads = run("reference", spec, tensors, **options)
        leaves = {k: x.detach().clone().requires_grad_(k != "x") for k, x in tensors.items()}
        weights = (leaves["recurrent_weight"], leaves["recurrent_bias"])
        rec0 = torch.nn.functional.linear(leaves["spikes"], *weights)
        state = (leaves["v"], leaves["i"] if spec.synapse else None)
        params = torch.stack([leaves[k] for k in NeuronParams._fields])
        inputs = (leaves["x"], leaves["weight"], leaves["bias"], *weights, rec0, *state, params)
        outs = spiking_layer_op(inputs, spec, FAST_SIGMOID, options | {"backend": "triton"})
        outputs = {k: x for k, x in zip(("spikes", "mem", "v", "i"), outs, strict=True) if x is not None}
        backward_from_random(outputs)
        del expected["active_fraction"]
        assert_outputs_equal(outputs, expected)
        assert_grads_close({k: x.grad for k, x in leaves.items() if x.grad is not None}, expected_grads)

    @pytest.mark.parametrize("min_active", [0.0, 0.9], ids=["window", "guard"])
    def test_an_op_of_a_graph_keeps_to_the_guard(self, min_active):
        # the backward knows no config: how many neurons have to be near travels with the graph
        tensors = self.inputs(NeuronSpec(), 8, 2, 5, 20)
        leaf = tensors["weight"].clone().requires_grad_()
        params = torch.stack([tensors[k] for k in NeuronParams._fields])
        inputs = (tensors["x"], leaf, None, None, None, None, tensors["v"], None, params)
        options = {"backprop_threshold": 1e-7, "min_active": min_active, "backend": "triton"}
        spikes, *_ = spiking_layer_op(inputs, NeuronSpec(), FAST_SIGMOID, options)
        spikes.sum().backward()
        assert bool((leaf.grad != 0).any()) == (min_active > 0)

    def test_the_guard_is_counted_where_it_happens_and_read_when_asked(self):
        tensors = self.inputs(NeuronSpec(), 8, 2, 5, 20)
        leaf = tensors["weight"].clone().requires_grad_()
        record, name = tally.Record("TestedNeuron"), "the guarded layer"
        options = {"params": NeuronParams(mem=0.9), "backend": "triton", "name": name}
        with tally.running(record):
            for threshold in (1e-7, 0.5, 1e-7):
                out = spiking_layer(
                    tensors["x"], leaf, backprop_threshold=threshold, min_active=0.1, **options
                )
                assert out.active_fraction.dim() == 0
        assert record.calls == {"fused": 3}
        tally.fold()
        assert record.calls == {"fused": 3, "guard": 2}
        assert calls["guard", name] == 2
        tally.fold()
        assert calls.pop(("guard", name)) == 2

    def test_chosen_automatically(self):
        what = {"dtype": torch.float32, "spec": NeuronSpec(), "surrogate": FAST_SIGMOID}
        assert select("auto", "spiking_layer", device=torch.device(self.device), **what).name == "triton"
