"""Every option in the table of supported neurons, against upstream's own steps: spikes, states and every gradient.

What is said to be fused runs as one call of the op, what is said to fall back runs no call of it; both give what
upstream gives. In the normal run each option meets one backend, window and dtype in turn; the sweep of all is slow.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from oracle import INTERPRETING, norse_loop, relative, spikes
from torch import nn

snntorch = pytest.importorskip("snntorch")
norse = pytest.importorskip("norse.torch")

import snn_sparse_plugin as ssp  # noqa: E402
from snn_sparse_plugin.adapters import adapter_of, loaded_adapters  # noqa: E402
from snn_sparse_plugin.adapters.norse_examples import changed  # noqa: E402
from snn_sparse_plugin.core import registry  # noqa: E402
from snn_sparse_plugin.interfaces import supported  # noqa: E402

T, B, N = 5 if INTERPRETING else 12, 2, 4
EXAMPLES = {
    (adapter.name, name): example
    for adapter in loaded_adapters()
    if adapter.name in ("snntorch", "norse")
    for name, example in adapter.examples().items()
}
ROWS = {(row.library, row.neuron): row for row in supported.rows()}
REFUSED = {"refuses", "raises"}  # words of the reasons why upstream itself cannot do it
SHAPES = {
    ("SConv2dLSTM", ""): (1, 8, 8),
    ("RLeaky", "conv2d_channels"): (4, 3, 3),
    ("RSynaptic", "conv2d_channels"): (4, 3, 3),
}
# classes that step keep their state inside only if told so
HIDDEN = {"init_hidden": True, "output": True}
# sizes of currents and weights at which a neuron of default parameters spikes now and then
LOUD = {
    "Izhikevich": 90.0,
    "LSNN": 25.0,
    "IAF": 1.0,
    "LIFBox": 40.0,
    "Lapicque": 20.0,
    "AssociativeLeaky": 3.0,
}


class Case(NamedTuple):
    library: str
    neuron: str
    option: str
    fused: bool


class Way(NamedTuple):
    window: float | None
    dtype: torch.dtype
    backend: str


def cases() -> list[Case]:
    found = []
    for key, example in EXAMPLES.items():
        if key[1] == "LIFCorrelation":  # is called with weights and states of its own
            continue
        row = ROWS[key]
        fused = not row.fused.startswith("no")
        found.append(Case(*key, "", fused))
        for option in example.options:
            known = option in row.fused_options
            if known or not REFUSED & set(row.fallback.get(option, "").split()):
                found.append(Case(*key, option, known))
    return found


def ways(library: str) -> list[Way]:
    # spikes of snnTorch are float32 whatever the dtype, so that its gradients in float64 are not
    dtypes = [torch.float32, torch.float64] if library == "norse" and not INTERPRETING else [torch.float32]
    backends = ["triton"] if INTERPRETING else ["cpu", "reference"]
    return [Way(*way) for way in itertools.product((None, 0.3), dtypes, backends)]


def sweep() -> list[Any]:
    """Every case in every way; all but one way of each, taken in turn, are slow, in the interpreter most cases too."""
    found = []
    for number, case in enumerate(cases()):
        every = ways(case.library)
        for k, way in enumerate(every):
            marks = [] if k == number % len(every) else [pytest.mark.slow]
            if INTERPRETING:
                marks.append(pytest.mark.triton_interpreter)
                if number % 30 and (case.neuron, case.option) != ("CobaLIFCell", ""):
                    marks.append(pytest.mark.slow)
            window = "exact" if way.window is None else "window"
            name = "-".join([case.neuron, case.option or "plain", way.backend, window, str(way.dtype)[6:]])
            found.append(pytest.param(case, way, id=name, marks=marks))
    return found


@pytest.fixture(autouse=True)
def _fresh():
    snntorch.SpikingNeuron.instances.clear()  # one DeltaLeaky alive breaks utils.reset for everyone


def build(case: Case, dtype: torch.dtype) -> tuple[nn.Module, list[torch.Tensor]]:
    """The neuron with weights on a grid, and the leaves among its parameters that are no ``nn.Parameter``."""
    torch.manual_seed(1)
    example, adapter = EXAMPLES[case[:2]], registry.load("adapters", case.library)
    steps = case.library == "snntorch" and not adapter.takes_sequence(example.build())
    more = HIDDEN if steps else {}
    module = example.with_option(case.option, **more) if case.option else example.build(**more)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() > 1 and "weight_hh" not in name:
                size = loudness(case) / (8 if "recurrent" in name else 1)
                p.copy_(((torch.randn(p.shape) + 0.5) * size * 64).round() / 256)
    leaves = []
    if case.option == "p per neuron":
        module.p = changed(module.p, lambda _, v: leaf(v, dtype))
        leaves = [p for p in flat(module.p) if p.requires_grad]
    if case.option.startswith("method="):
        # a surrogate that is 100 times steeper makes gradients explode through upstream's differentiable resets, and
        # the circle, which grows without bound, does so in a neuron that counts in millivolts
        alpha = torch.tensor(0.125 if (case.neuron, case.option) == ("CobaLIFCell", "method=circ") else 0.5)
        module.p = changed(module.p, lambda name, v: alpha if name == "alpha" else v)
    return module.to(dtype), leaves


def leaf(value: Any, dtype: torch.dtype) -> Any:
    per_neuron = isinstance(value, torch.Tensor) and value.dim() == 1
    return value.to(dtype).requires_grad_() if per_neuron else value


def start(case: Case, x: torch.Tensor) -> Any:
    """An initial state where upstream's own will not do: it is float32, and a single number for all neurons."""
    if case.neuron == "CobaLIFCell":  # with no input but its recurrence, it has to start near its threshold
        z, v, g_e, g_i = torch.rand(4, B, N, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
        return as_leaves(norse.CobaLIFState((z > 0.5).to(x.dtype), 10 * v - 15, g_e, g_i), x.dtype)
    if case.library == "snntorch" or (case.option != "p per neuron" and x.dtype == torch.float32):
        return None
    plain, _ = build(case._replace(option=""), x.dtype)
    with torch.no_grad():
        return as_leaves(upstream(plain, x[:2].detach())[1], x.dtype)


def as_leaves(state: Any, dtype: torch.dtype) -> Any:
    if isinstance(state, torch.Tensor):
        return state.to(dtype, copy=True).requires_grad_()
    return type(state)(*(as_leaves(part, dtype) for part in state))


def loudness(case: Case) -> float:
    known = [size for name, size in LOUD.items() if case.neuron.startswith(name)]
    return known[0] if known else 12.0 if case.library == "norse" else 1.5


def flat(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        state = tuple(state.values())
    return [t for part in state for t in flat(part)] if isinstance(state, tuple) else []


def upstream(module: nn.Module, x: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
    """Upstream's own call for sequence classes, else its step loop: -> (outputs, state)."""
    adapter = adapter_of(module)
    if adapter.takes_sequence(module):
        out = module(x) if state is None else module(x, state)
        return (out, None) if isinstance(out, torch.Tensor) else out
    if adapter.name == "norse":
        return norse_loop(module, x, state)
    return torch.stack([module(h)[0] for h in x]), adapter.read_state(module)


def run(case: Case, way: Way, how: str) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]:
    """Outputs, states, gradients: of ``"upstream"``, of upstream ``"stepped"`` in sparse mode, or ``"fused"``."""
    module, leaves = build(case, way.dtype)
    shape = (T, B, *SHAPES.get((case.neuron, case.option), (N,)))
    x = spikes(*shape, density=0.4)
    if not any(hasattr(module, name) for name in ("input_weights", "linear", "rnn", "to_v")):
        x = x * (torch.rand(shape) * loudness(case) * 64).round() / 64
    x = x.to(way.dtype).requires_grad_()
    initial = start(case, x)
    leaves = [*leaves, *flat(initial)]
    options: dict[str, Any] = {"backprop_threshold": way.window, "min_active": 0.0}
    if how == "fused":
        out, _, (state,) = ssp.unroll(module, x, [initial], backend=way.backend, **options)
    elif how == "stepped":
        with ssp.sparse_mode(fuse_time=False, **options):
            out, state = upstream(module, x, initial)
    else:
        out, state = upstream(module, x, initial)
    sequence = case.library == "snntorch" and adapter_of(module).takes_sequence(module)
    states = [] if sequence else flat(state)
    generator = torch.Generator().manual_seed(2)
    loss = torch.zeros(())
    for y in (out, *states):
        # of one sign, so that the gradient of a single number is no difference of large ones
        loss = loss + (y * torch.rand(y.shape, generator=generator, dtype=way.dtype)).sum()
    leaves = [x, *(p for p in module.parameters() if p.requires_grad), *leaves]
    if not loss.requires_grad:
        return out, states, [None for _ in leaves]
    return out.detach(), states, list(torch.autograd.grad(loss, leaves, allow_unused=True))


@pytest.mark.parametrize(("case", "way"), sweep())
def test_option(case, way, counted):
    how = "upstream" if way.window is None else "stepped"
    try:
        expected = run(case, way, how)
    except ValueError as error:  # Norse's "adjoint" is none of its own threshold functions
        with pytest.raises(ValueError, match=str(error)[:20]):
            run(case, way, "fused")
        return
    assert not counted
    if way.window is None:  # in exact mode a step is upstream's, to the bit
        assert_same(run(case, way, "stepped"), expected)
        assert not counted
    actual = run(case, way, "fused")
    if not case.fused:
        assert not counted
        assert_same(actual, expected)
        return
    assert counted[way.backend, "forward"] == 1
    row = ROWS[case[:2]]
    readout = "readout" in row.per_step or case.option == "output"
    # the few steps in the interpreter are too short for some to fire
    assert readout or INTERPRETING or 0.01 < float((expected[0] != 0).float().mean()) < 0.97
    exact = row.exactness == supported.EXACT
    for a, e in zip([actual[0], *actual[1]], [expected[0], *expected[1]], strict=True):
        assert torch.equal(a, e) if exact else relative(a.detach(), e.detach()) < 1e-6
    tolerance = 1e-5 if way.dtype == torch.float32 else 1e-11
    if case.option == "method=heavi_erfc" and way.dtype == torch.float64:
        tolerance = 1e-6  # upstream's derivative takes the root of a float32 pi
    for a, e in zip(actual[2], expected[2], strict=True):
        if e is None or not e.any():
            assert a is None or not a.any()
        else:
            assert relative(a, e) < tolerance


def assert_same(actual: Any, expected: Any) -> None:
    for a, e in zip(
        [actual[0], *actual[1], *actual[2]], [expected[0], *expected[1], *expected[2]], strict=True
    ):
        assert (a is None) == (e is None)
        assert e is None or torch.equal(a, e)
