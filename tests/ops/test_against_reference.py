"""The CPU backend against the reference: spikes and states equal, every gradient to rounding."""

import itertools

import pytest
import torch
from helpers import members, name, on_grid, relative, spikes
from hypothesis import given, settings
from hypothesis import strategies as st

from snn_sparse_plugin import NeuronParams, NeuronSpec, NeuronState, SpikeTrain, Surrogate
from snn_sparse_plugin.backends.cpu import layout, outgoing
from snn_sparse_plugin.backends.cpu import spiking_layer as spiking_layer_cpu
from snn_sparse_plugin.core.surrogates import KINDS
from snn_sparse_plugin.ops import spiking_layer


def build(
    spec, T, B, M, N, *, recurrent=False, dtype=torch.float32, params_grad=False, events=False, current=False
):
    """Inputs, leaves and upstream gradients of one problem, weights on the binary grid."""
    euler = spec.update != "decay"
    x = on_grid(T, B, N, scale=0.5) if current else spikes(T, B, M, p=0.15)
    leaves = {
        "weight": on_grid(N, M, scale=0.5),
        "bias": on_grid(N, scale=0.25),
        "v": torch.rand(B, N) * 1.5,
        "i": on_grid(B, N),
        "mem": torch.rand(N) * 0.3 + (0.1 if euler else 0.6),
        "syn": torch.rand(N) * 0.4 + 0.3,
        "threshold": torch.rand(N) * 0.5 + 0.5,
        "leak": torch.rand(N) * 0.2 - 0.1,
        "reset_value": torch.rand(N) * 0.2 - 0.1,
    }
    if current:
        del leaves["weight"], leaves["bias"]
        leaves["current"] = x
    if recurrent:
        leaves |= {
            "rec_weight": on_grid(N, N, scale=0.125),
            "rec_bias": on_grid(N, scale=0.125),
            "spikes": spikes(B, N, p=0.3),
        }
    if not spec.synapse:
        del leaves["i"]
    leaves = {k: v.to(dtype) for k, v in leaves.items()}
    grads = {k: torch.randn(s, dtype=dtype) for k, s in _outputs(spec, T, B, N).items()}
    return x.to(dtype), leaves, grads, params_grad


def _outputs(spec, T, B, N):
    shapes = {"spikes": (T, B, N), "mem": (T, B, N), "v": (B, N)}
    return shapes | ({"i": (B, N)} if spec.synapse else {})


PARAMS = ("mem", "syn", "threshold", "leak", "reset_value")


def run(problem, spec, backend, surrogate, threshold, *, as_events=False, min_active=0.0):
    x, leaves, grads, params_grad = problem
    leaves = {k: v.clone().requires_grad_(k not in PARAMS or params_grad) for k, v in leaves.items()}
    layer = {}
    if "weight" in leaves:
        layer = {"weight": leaves["weight"], "bias": leaves["bias"]}
    if "rec_weight" in leaves:
        layer |= {"recurrent_weight": leaves["rec_weight"], "recurrent_bias": leaves["rec_bias"]}
    out = spiking_layer(
        leaves.get("current", x),
        **layer,
        spec=spec,
        params=NeuronParams(*(leaves[p] for p in PARAMS)),
        surrogate=surrogate,
        state=NeuronState(leaves["v"], leaves.get("i"), leaves.get("spikes")),
        return_mem=True,
        events=as_events and spec.spiking,
        backend=backend,
        backprop_threshold=threshold,
        min_active=min_active,
    )
    dense = out.spikes.to_dense() if isinstance(out.spikes, SpikeTrain) else out.spikes
    found = {"spikes": dense, "mem": out.mem, "v": out.state.v, "i": out.state.i}
    loss = sum((found[k] * g).sum() for k, g in grads.items())
    wanted = {k: v for k, v in leaves.items() if v.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    zeros = [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, wanted.values(), strict=True)]
    return found, dict(zip(wanted, zeros, strict=True)), out


def compare(problem, spec, surrogate, threshold, tolerance=1e-5, precise=None, **options):
    """``precise``: gradients of the reference in double precision, where its own sums may be rounded by more."""
    expected, expected_grads, _ = run(problem, spec, "reference", surrogate, threshold)
    found, grads, out = run(problem, spec, "cpu", surrogate, threshold, **options)
    for key, value in found.items():
        if value is not None:
            assert torch.equal(value, expected[key]), key
    for key, grad in grads.items():
        references = [expected_grads[key], *([] if precise is None else [precise[key].to(grad.dtype)])]
        assert min(relative(grad, other) for other in references) < tolerance, key
    return out


FAST = Surrogate("fast_sigmoid", (10.0,))


# the recurrent neurons that exist upstream: RLeaky, RSynaptic, LIFRecurrent
RECURRENT = [
    NeuronSpec(),
    NeuronSpec(reset="zero", scope="sum"),
    NeuronSpec(reset="subtract", timing="corrected", attached=True),
    NeuronSpec(synapse=True),
    NeuronSpec("euler", True, "value", "immediate"),
]
WINDOWS = pytest.mark.parametrize("threshold", [None, 0.02, 1.0], ids=["exact", "narrow", "wide"])


@WINDOWS
@pytest.mark.parametrize(
    ("spec", "recurrent"),
    [pytest.param(*m.values, False, id=m.id, marks=m.marks) for m in members()]
    + [pytest.param(s, True, id=name(s) + "-recurrent") for s in RECURRENT],
)
def test_every_neuron(spec, recurrent, threshold, counted):
    compare(build(spec, 40, 3, 30, 21, recurrent=recurrent), spec, FAST, threshold)
    needs_states = spec.timing == "corrected" and spec.reset == "zero"
    replays = spec.spiking and (threshold != 0.02 or needs_states)  # the adjoint of a readout only decays
    assert counted["cpu", "backward:replay" if replays else "backward:list"] == 1
    assert counted["cpu", "forward"] == 1


@pytest.mark.parametrize("threshold", [None, 0.02], ids=["exact", "narrow"])
@pytest.mark.parametrize("recurrent", [False, True], ids=["", "recurrent"])
@pytest.mark.parametrize("spec", [NeuronSpec(), NeuronSpec(synapse=True)], ids=name)
def test_blocks_cut_across_samples_and_steps(spec, recurrent, threshold, monkeypatch):
    monkeypatch.setattr(outgoing, "BLOCK_ITEMS", 1)  # 16 rows
    for T in (1, 7, 40):
        problem = build(spec, T, 5, 30, 21, recurrent=recurrent)
        compare(problem, spec, FAST, threshold)
        compare(problem, spec, FAST, threshold, as_events=True)
        for unused in ("mem", "v"):  # without them, nothing but spikes drives the adjoint
            del problem[2][unused]
        compare(problem, spec, FAST, threshold, as_events=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [0, 1 << 16], ids=["replayed", "membrane kept"])
@pytest.mark.parametrize("graded", [False, True], ids=["binary", "graded"])
@pytest.mark.parametrize("density", [0.002, 0.3], ids=["few", "many"])
@pytest.mark.parametrize("spec", [NeuronSpec(), NeuronSpec(synapse=True), NeuronSpec(reset="zero")], ids=name)
def test_blocks_hold_several_samples_and_parts_of_them(spec, density, graded, kept, dtype, monkeypatch):
    monkeypatch.setattr(outgoing, "BLOCK_ITEMS", 40 * 32)  # 40 rows
    monkeypatch.setattr(spiking_layer_cpu, "KEEP_MEM_OF", kept)
    monkeypatch.setattr(layout, "SHORTEST", 0.0)  # a range of samples for each thread
    for T in (1, 7, 33, 70):
        _, *rest = build(spec, T, 5, 60, 21, dtype=dtype)
        x = (spikes(T, 5, 60, p=density) * (0.5 if graded else 1.0)).to(dtype)
        for threshold in (None, 0.02):
            compare((x, *rest), spec, FAST, threshold)
            compare((SpikeTrain.from_dense(x), *rest), spec, FAST, threshold, as_events=True)


@pytest.mark.parametrize("threshold", [None, 0.02], ids=["exact", "narrow"])
@pytest.mark.parametrize(
    ("spec", "recurrent"),
    [pytest.param(*m.values, False, id=m.id, marks=m.marks) for m in members()]
    + [pytest.param(s, True, id=name(s) + "-recurrent") for s in RECURRENT],
)
def test_decays_and_thresholds_learn(spec, recurrent, threshold):
    compare(build(spec, 40, 2, 20, 17, recurrent=recurrent, params_grad=True), spec, FAST, threshold)


@pytest.mark.parametrize("spec", members())
def test_current_input(spec):
    compare(build(spec, 35, 3, 0, 19, current=True), spec, FAST, 0.05)


@WINDOWS
@pytest.mark.parametrize("spec", [RECURRENT[0], RECURRENT[-1]], ids=name)
def test_events_out_carry_the_same_gradient(spec, threshold):
    compare(build(spec, 40, 3, 30, 21, recurrent=True), spec, FAST, threshold, as_events=True)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "zero"])
@pytest.mark.parametrize("threshold", [None, 0.06, "auto"], ids=["exact", "narrow", "auto"])
def test_every_surrogate(kind, threshold):
    params = {
        "fast_sigmoid": (25.0,),
        "atan": (2.0,),
        "sigmoid": (25.0,),
        "triangular": (1.0,),
        "spike_rate_escape": (1.0, 25.0),
        "sparse_fast_sigmoid": (25.0, 0.02),
        "triangle": (0.3,),
        "tanh": (3.0,),
        "circ": (0.5,),
        "erfc": (2.0,),
    }.get(kind, ())
    spec = NeuronSpec()
    compare(build(spec, 40, 3, 30, 21), spec, Surrogate(kind, params), threshold)


@pytest.mark.parametrize(
    "spec", [NeuronSpec(), NeuronSpec("euler", True, "value", "immediate", attached=True)], ids=name
)
def test_float64(spec):
    problem = build(spec, 70, 3, 30, 21, recurrent=True, params_grad=True, dtype=torch.float64)
    out = compare(problem, spec, FAST, None, tolerance=1e-12)
    assert out.spikes.dtype == torch.float64
    assert out.state.v.dtype == torch.float64


@settings(max_examples=40, deadline=None)
@given(
    T=st.sampled_from([0, 1, 2, 31, 32, 33, 65]),
    B=st.integers(0, 4),
    M=st.sampled_from([1, 15, 16, 33]),
    N=st.sampled_from([1, 15, 16, 17, 63]),
    threshold=st.sampled_from([None, 0.02, 0.2, "auto"]),
    recurrent=st.booleans(),
    spec=st.sampled_from([m.values[0] for m in members() if not m.marks]),
)
def test_any_shape(T, B, M, N, threshold, recurrent, spec):
    recurrent = recurrent and spec in RECURRENT
    problem = build(spec, T, B, M, N, recurrent=recurrent, params_grad=True)
    for grad in problem[2].values():
        grad.abs_()  # of one sign, so that fewer terms cancel in the gradient of a single number
    x, leaves, grads, params_grad = problem
    double = [{k: v.double() for k, v in tensors.items()} for tensors in (leaves, grads)]
    _, precise, _ = run((x.double(), *double, params_grad), spec, "reference", FAST, threshold)
    compare(problem, spec, FAST, threshold, precise=precise)


@pytest.mark.parametrize("threshold", [None, 0.02], ids=["exact", "narrow"])
@pytest.mark.parametrize("spec", [m for m in members() if m.values[0].spiking])
def test_a_loss_on_the_membrane_alone_replays_nothing(spec, threshold, counted):
    problem = build(spec, 40, 3, 30, 21)
    del problem[2]["spikes"]
    compare(problem, spec, FAST, threshold)
    needs_states = spec.attached or (spec.timing == "corrected" and spec.reset == "zero")
    needs_spikes = spec.reset in ("zero", "value") and threshold is None
    listed = (threshold is not None and not (spec.timing == "corrected" and spec.reset == "zero")) or not (
        needs_states or needs_spikes
    )
    assert counted["cpu", "backward:list"] == listed


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_rounding_only(threads):
    before = torch.get_num_threads()
    spec = NeuronSpec()
    problem = build(spec, 50, 5, 40, 33, recurrent=True)
    try:
        torch.set_num_threads(threads)
        first = run(problem, spec, "cpu", FAST, 0.05)[1]
        second = run(problem, spec, "cpu", FAST, 0.05)[1]
        compare(problem, spec, FAST, 0.05)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_arbitrary_weights_differ_only_within_rounding_of_the_threshold():
    T, B, M, N = 100, 8, 200, 127
    x, w = spikes(T, B, M, p=0.05), torch.randn(N, M) * 0.3
    params = NeuronParams(0.9)
    a = spiking_layer(x, w, params=params, backend="cpu", return_mem=True)
    b = spiking_layer(x, w, params=params, backend="reference", return_mem=True)
    differs = a.spikes != b.spikes
    assert differs.float().mean() <= 1e-5
    first = differs & (differs.cumsum(0) == 1)
    assert ((b.mem - 1).abs()[first] < 1e-4).all()


def test_chain_of_layers_equals_one_dense_graph():
    """Gradients through events, layer by layer, equal the reference's dense ones."""
    sizes, surrogate = [40, 33, 17, 5], Surrogate("fast_sigmoid", (25.0,))
    x = spikes(60, 4, 40)
    weights = [on_grid(n, m, scale=0.5) for m, n in itertools.pairwise(sizes)]
    upstream = torch.randn(60, 4, 5)
    found = {}
    for backend in ("reference", "cpu"):
        for threshold in (None, 0.04):
            leaves = [w.clone().requires_grad_() for w in weights]
            h = x
            for k, w in enumerate(leaves):
                last = k == len(leaves) - 1
                out = spiking_layer(
                    *(h, w),
                    params=NeuronParams(0.875),
                    surrogate=surrogate,
                    events=not last,
                    return_mem=last,
                    backend=backend,
                    backprop_threshold=threshold,
                    min_active=0,
                )
                h = out.spikes
            assert out.spikes.sum() > 0
            found[backend, threshold] = torch.autograd.grad((out.mem * upstream).sum(), leaves)
    for threshold in (None, 0.04):
        for a, b in zip(found["cpu", threshold], found["reference", threshold], strict=True):
            assert b.norm() > 0
            assert relative(a, b) < 1e-5
    assert relative(found["cpu", 0.04][0], found["cpu", None][0]) > 1e-3  # the window did cut something
