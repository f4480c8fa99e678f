"""torch.compile, torch.jit and ONNX on every class: what works for upstream works sparse, in the same way."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from helpers import compiles_whole
from snntorch_cases import (
    CASES,
    STEPPED,
    WAYS,
    assert_same,
    equal,
    every_class,
    every_way,
    explicit_steps,
    observe,
    outcome,
    snntorch,
    steps,
)
from torch import nn

from snntorch import surrogate  # isort: skip
from snn_sparse_plugin import sparsify  # isort: skip

tree_leaves = torch.utils._pytree.tree_leaves


def some_slow(names, keep):
    """Parameters of which only those in ``keep`` run by default: tracing takes about a second each."""
    return [pytest.param(n, id=n, marks=[] if n in keep else pytest.mark.slow) for n in names]


def same_outcome(run, case, way, **options):
    """run(module) gives the same result or the same kind of error sparse as plain; -> the kind of error."""
    torch._dynamo.reset()
    error, theirs = outcome(lambda: run(case.build(**options)))
    torch._dynamo.reset()
    with way.on():
        failed, ours = outcome(lambda: run(way.ready(case.build(way.library, **options))))
    torch._dynamo.reset()
    assert failed == error, ours
    if not error:
        assert_same(ours, theirs)
    return error


class TestCompile:
    @compiles_whole
    @pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
    @pytest.mark.parametrize("name", some_slow(CASES, {"Leaky", "StateLeaky"}))
    def test_without_a_graph_break(self, name, way):
        case = CASES[name]

        def run(module):
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            return observe(compiled, case, steps if case.sequence else explicit_steps)

        # Dynamo refuses the nn.RNN inside LeakyParallel
        assert bool(same_outcome(run, case, way)) == (name == "LeakyParallel")

    @pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
    @pytest.mark.parametrize("name", some_slow(STEPPED, {"Synaptic"}))
    def test_with_the_state_inside(self, name, way):
        case = STEPPED[name]

        def run(module):
            return observe(torch.compile(module, backend="aot_eager"), case)

        assert same_outcome(run, case, way, init_hidden=True) == ""

    @pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
    @pytest.mark.parametrize("name", some_slow(["Leaky", "Synaptic", "RLeaky"], set()))
    def test_reset_without_delay_breaks_the_graph_as_upstreams_does(self, name, way):
        case = STEPPED[name]

        def run(module):
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            return observe(compiled, case, explicit_steps)

        assert same_outcome(run, case, way, reset_delay=False) != ""

    @compiles_whole
    @pytest.mark.parametrize(
        "name",
        some_slow(
            [n for n in CASES if CASES[n].knows("spike_grad") and n != "LeakyParallel"], {"DeltaLeaky"}
        ),
    )
    def test_the_window_is_in_the_graph(self, name):
        case = CASES[name]
        window = {"backprop_threshold": 0.15, "min_active": 0}

        def run(compiled):
            torch._dynamo.reset()
            module = case.build(spike_grad=surrogate.fast_sigmoid(5))
            sparsify(module, **window)
            called = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
            return observe(called, case, steps if case.sequence else explicit_steps)

        eager, graph = run(False), run(True)
        names = {name: name.removeprefix("_orig_mod.") for name in graph["grads"]}
        graph["grads"] = {names[name]: grad for name, grad in graph["grads"].items()}
        assert_same({**graph, "hidden": {}}, {**eager, "hidden": {}})
        plain = observe(
            case.build(spike_grad=surrogate.fast_sigmoid(5)), case, steps if case.sequence else explicit_steps
        )
        assert not torch.allclose(graph["grads"]["input"], plain["grads"]["input"])

    @pytest.mark.slow
    @every_way
    def test_a_network_over_time_with_the_default_backend(self, way):
        def build(library):
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Linear(4, 8),
                library.Leaky(0.9, init_hidden=True),
                nn.Linear(8, 3),
                library.Synaptic(0.8, 0.9, init_hidden=True, output=True),
            )

        class Loop(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net

            def forward(self, x):
                outs = [self.net(h) for h in x.unbind(0)]
                return torch.stack([o[0] for o in outs]), outs[-1][-1]

        case = CASES["Leaky"]
        torch._dynamo.reset()
        theirs = observe(Loop(build(snntorch)), case, lambda net, _, x: [net(x)])
        with way.on():
            compiled = torch.compile(Loop(way.ready(build(way.library))), fullgraph=True)
            ours = observe(compiled, case, lambda net, _, x: [net(x)])
        # the default backend fuses operations: rounding, and no spike of these inputs is that near
        assert equal(ours["outputs"][0], theirs["outputs"][0])
        for a, b in zip(ours["grads"].values(), theirs["grads"].values(), strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
        torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
class TestJit:
    @every_way
    @every_class
    def test_script_is_refused_as_upstreams_is(self, case, way):
        error, _ = outcome(lambda: torch.jit.script(case.hidden()))
        with way.on():
            failed, _ = outcome(lambda: torch.jit.script(way.ready(case.hidden(way.library))))
        assert failed == error == "RuntimeError"

    @every_way
    @every_class
    def test_trace(self, case, way):
        """A traced module gives upstream's spikes; upstream keeps no gradient formula in a trace to compare."""
        x = case.inputs() if case.sequence else case.inputs()[0]
        state = () if case.sequence else case.zeros()

        def run(module):
            traced = torch.jit.trace(module, (x, *state), check_trace=False)
            file = io.BytesIO()
            with torch.no_grad():
                return tree_leaves(traced(x, *state)), outcome(lambda: torch.jit.save(traced, file))[0]

        (theirs, saved), plain = run(case.build()), tree_leaves(case.build()(x, *state))
        with way.on():
            ours, ours_saved = run(way.ready(case.build(way.library)))
        assert ours_saved == saved
        for a, b, c in zip(ours, theirs, plain, strict=True):
            assert equal(a, b)
            assert equal(b, c.detach())


def exported(module, case, dynamo):
    """The operators of the ONNX graph, and what onnxruntime computes with it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    x = case.inputs() if case.sequence else case.inputs()[0]
    args = (x,) if case.sequence else (x, *case.zeros())
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            program = torch.onnx.export(module.eval(), args, dynamo=True, verbose=False)
            program.save(file)
        else:
            torch.onnx.export(module.eval(), args, file, dynamo=False)
    data = file.getvalue()
    graph = onnx.load_from_string(data).graph
    session = onnxruntime.InferenceSession(data)
    names = [i.name for i in session.get_inputs()]
    flat = tree_leaves(args)
    by_name = dict(zip([i.name for i in graph.input], flat, strict=False))
    out = session.run(None, {n: by_name[n].numpy() for n in names})
    return [node.op_type for node in graph.node], [torch.as_tensor(o) for o in out]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
class TestOnnx:
    """With surrogate_disable where there is one, as upstream's documentation advises."""

    @pytest.mark.parametrize("dynamo", [False, True], ids=["trace", "dynamo"])
    @pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
    @pytest.mark.parametrize("name", some_slow(CASES, {"Leaky"}))
    def test_export(self, name, way, dynamo):
        case = CASES[name]
        options = {"surrogate_disable": True} if case.knows("surrogate_disable") else {}
        pytest.importorskip("onnxruntime")
        error, theirs = outcome(lambda: exported(case.build(**options), case, dynamo))
        with way.on():
            failed, ours = outcome(
                lambda: exported(way.ready(case.build(way.library, **options)), case, dynamo)
            )
        assert failed == error, ours
        if not error:
            if options:  # else the window is part of the graph
                assert ours[0] == theirs[0]
            assert all(equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))

    @pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
    @pytest.mark.parametrize("name", some_slow(CASES, {"Leaky"}))
    def test_export_with_a_surrogate(self, name, way):
        case = CASES[name]
        pytest.importorskip("onnxruntime")
        error, theirs = outcome(lambda: exported(case.build(), case, False))
        with way.on():
            failed, ours = outcome(lambda: exported(way.ready(case.build(way.library)), case, False))
        assert failed == error, ours
        if not error:
            assert all(equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))


@every_way
@every_class
def test_functional_call(case, way):
    def run(module):
        parameters = {k: v.detach() + 0.01 for k, v in module.named_parameters()}
        x = case.inputs() if case.sequence else case.inputs()[0]
        state = () if case.sequence else case.zeros()
        return tree_leaves(torch.func.functional_call(module, parameters, (x, *state)))

    theirs = run(case.build())
    with way.on():
        ours = run(way.ready(case.build(way.library)))
    assert all(equal(a, b) for a, b in zip(ours, theirs, strict=True))


@every_way
def test_per_sample_gradients_are_refused_as_upstreams_are(way):
    """snnTorch's spike functions are autograd Functions of the old form, which torch.func does not transform."""
    x = CASES["Leaky"].inputs()[0]

    def run(neuron):
        def loss(sample):
            return neuron(sample, torch.zeros_like(sample))[0].sum()

        return torch.func.vmap(torch.func.grad(loss))(x)

    expected = outcome(lambda: run(CASES["Leaky"].build()))
    with way.on():
        got = outcome(lambda: run(way.ready(CASES["Leaky"].build(way.library))))
    assert got[0] == expected[0] == "RuntimeError"
    assert got[1] == expected[1]
