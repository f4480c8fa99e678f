"""float16 and bfloat16, given or by autocast: fused with a float32 state, with upstream's dtypes and its numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

snn = pytest.importorskip("snntorch")
norse = pytest.importorskip("norse.torch")

import snn_sparse_plugin as ssp  # noqa: E402
from snn_sparse_plugin.adapters import record_of  # noqa: E402
from snn_sparse_plugin.core.backend import calls  # noqa: E402
from snn_sparse_plugin.core.dynamics import NeuronParams  # noqa: E402
from snn_sparse_plugin.fusion.recorded import Recorded  # noqa: E402
from snn_sparse_plugin.ops import spiking_layer  # noqa: E402

T, B, N = 12, 3, 6
HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def snn_loop(neuron: Any, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Spikes, membranes and the final state."""
    spikes, mems = [], []
    state: list[Tensor] = []
    for step in x:
        spk, *state = neuron(step)
        spikes.append(spk)
        mems.append(state[-1])
    return torch.stack(spikes), torch.stack(mems), state


def norse_loop(cell: Any, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    state, spikes, mems = None, [], []
    for step in x:
        out, state = cell(step, state)
        spikes.append(out)
        mems.append(state.v)
    return torch.stack(spikes), torch.stack(mems), list(state)


def hidden(kind: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(snn, kind)(init_hidden=True, output=True, **options)


# those whose state upstream keeps in float32 too give the very same spikes and membranes
EXACT = {
    "Leaky": (hidden("Leaky", beta=0.9), snn_loop),
    "Leaky-zero": (hidden("Leaky", beta=0.9, reset_mechanism="zero"), snn_loop),
    "Leaky-now": (hidden("Leaky", beta=0.9, reset_delay=False), snn_loop),
    "Leaky-learnt": (hidden("Leaky", beta=torch.full((N,), 0.9), learn_beta=True), snn_loop),
    "LIFCell": (lambda: norse.LIFCell(), norse_loop),
}
ROUNDED = {
    "Lapicque": (hidden("Lapicque", beta=0.9), snn_loop),  # multiplies its input in half
    "Leaky-none": (hidden("Leaky", beta=0.5, reset_mechanism="none"), snn_loop),
    "Synaptic": (hidden("Synaptic", alpha=0.5, beta=0.5), snn_loop),
    "RLeaky": (hidden("RLeaky", beta=0.5, linear_features=N), snn_loop),
    "RLeaky-one-to-one": (hidden("RLeaky", beta=0.5, all_to_all=False, V=0.5), snn_loop),
    "LIFBoxCell": (lambda: norse.LIFBoxCell(), norse_loop),
    "LIFRecurrentCell": (lambda: norse.LIFRecurrentCell(N, N), norse_loop),
}


def both(build: Any, loop: Any, x: Tensor, half: torch.dtype, autocast: bool) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    neuron = build()
    fc = nn.Linear(N, N)
    with torch.no_grad():
        weak = type(neuron).__name__ in ("Lapicque", "LIFCell", "LIFBoxCell", "LIFRecurrentCell")
        fc.weight.copy_(((fc.weight * 8).round() / 8 + 0.125) * (8 if weak else 1))
        fc.bias.zero_()
    if not autocast:
        fc = fc.to(half)
    twins = copy.deepcopy((fc, neuron))

    def run(fc: Any, neuron: Any) -> Any:
        with torch.autocast("cpu", half, enabled=autocast):
            return loop(Fed(fc, neuron), x if autocast else x.to(half))

    expected = run(*twins)
    with ssp.sparse_mode(backprop_threshold=None):
        found = run(fc, neuron)
        assert type(found[0]) is Recorded
    return expected, found, neuron


class Fed:
    """A neuron behind a linear layer, with the neuron's attributes."""

    def __init__(self, fc: Any, neuron: Any) -> None:
        self.fc, self.neuron = fc, neuron

    def __call__(self, x: Tensor, *state: Any) -> Any:
        return self.neuron(self.fc(x), *state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.neuron, name)


@HALVES
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "given"])
@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_a_loop(name: str, autocast: bool, half: torch.dtype) -> None:
    if not autocast and name in ("RLeaky", "LIFRecurrentCell"):
        pytest.skip("upstream multiplies float32 spikes with half weights, which torch refuses")
    torch.manual_seed(1)
    x = (torch.rand(T, B, N) < 0.4).float()
    build, loop = (EXACT | ROUNDED)[name]
    expected, found, neuron = both(build, loop, x, half, autocast)
    spikes, mems, state = found
    assert (spikes.dtype, mems.dtype) == (expected[0].dtype, expected[1].dtype)
    assert [s.dtype for s in state] == [s.dtype for s in expected[2]]
    assert spikes.sum() > 0
    assert record_of(neuron).calls == {"fused": 1}
    if name in EXACT:
        assert torch.equal(spikes, expected[0])
        assert torch.equal(mems, expected[1])
    else:
        assert (spikes != expected[0]).float().mean() < 0.02
        close = (mems.float() - expected[1].float()).abs() < 8 * torch.finfo(half).eps
        assert close.float().mean() > 0.9


@HALVES
def test_the_op(half: torch.dtype) -> None:
    x = (torch.rand(T, B, 8) < 0.4).to(half).requires_grad_()
    weight = (torch.randint(-8, 8, (N, 8)) / 8).to(half).requires_grad_()
    wide = [t.detach().float().requires_grad_() for t in (x, weight)]
    options: dict[str, Any] = {
        "params": NeuronParams(mem=0.9),
        "return_mem": True,
        "backprop_threshold": None,
    }
    calls.clear()
    out, expected = spiking_layer(x, weight, **options), spiking_layer(*wide, **options)
    assert set(calls) == {("cpu", "forward")}
    assert torch.equal(out.spikes, expected.spikes.to(half))
    assert torch.equal(out.mem, expected.mem.to(half))
    assert out.state.v.dtype == torch.float32
    found = torch.autograd.grad((out.spikes.float() * out.mem.float()).sum(), (x, weight))
    want = torch.autograd.grad((expected.spikes * expected.mem.to(half).float()).sum(), wide)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == half
        torch.testing.assert_close(a.float(), b, rtol=2 * torch.finfo(half).eps, atol=1e-3)


def test_the_op_takes_another_dtype_for_what_leaves() -> None:
    x, weight = torch.rand(T, B, 8).bfloat16(), torch.rand(N, 8).bfloat16()
    out = spiking_layer(x, weight, params=NeuronParams(mem=0.9), return_mem=True, dtype=torch.float32)
    assert out.spikes.dtype == out.mem.dtype == torch.float32


def test_the_op_computes_in_what_it_is_given_under_autocast() -> None:
    x, weight = torch.rand(T, B, 8), torch.rand(N, 8)
    expected = spiking_layer(x, weight, params=NeuronParams(mem=0.9))
    with torch.autocast("cpu", torch.bfloat16):
        found = spiking_layer(x, weight, params=NeuronParams(mem=0.9))
    assert torch.equal(found.state.v, expected.state.v)


@HALVES
def test_events_in_and_out(half: torch.dtype) -> None:
    dense = (torch.rand(T, B, 8) < 0.3).to(half)
    weight = (torch.randint(-8, 8, (N, 8)) / 8).to(half).requires_grad_()
    params = NeuronParams(mem=0.9)
    out = spiking_layer(ssp.SpikeTrain.from_dense(dense), weight, params=params, events=True)
    expected = spiking_layer(dense, weight, params=params)
    assert out.spikes.dtype == half
    assert torch.equal(out.spikes.to_dense(), expected.spikes)
    again = spiking_layer(out.spikes, weight[:, :N], params=params)
    assert torch.equal(again.spikes, spiking_layer(expected.spikes, weight[:, :N], params=params).spikes)
    again.spikes.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("way", ["loop", "unroll"])
def test_training_with_a_grad_scaler(way: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Linear(N, 8), snn.Leaky(0.9, init_hidden=True)),
        *(nn.Linear(8, 4), snn.Leaky(0.9, init_hidden=True, output=True)),
    )
    nets = {"sparse": net, "upstream": copy.deepcopy(net)}
    x = (torch.rand(T, B, N) < 0.5).float()

    def forward(net: Any, sparse: bool) -> Tensor:
        if sparse and way == "unroll":
            return ssp.unroll(net, x, backprop_threshold=None).mem
        return torch.stack([net(step)[1] for step in x])

    for which, net in nets.items():
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for _ in range(3):
            net[1].reset_mem()
            net[3].reset_mem()
            with torch.autocast("cpu", torch.float16):
                if which == "sparse" and way == "loop":
                    with ssp.sparse_mode(backprop_threshold=None):
                        loss = (forward(net, True) ** 2).mean()
                else:
                    loss = (forward(net, which == "sparse") ** 2).mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 256.0
    for a, b in zip(nets["sparse"].parameters(), nets["upstream"].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=4 * torch.finfo(torch.float16).eps)


def test_looking_at_upstreams_dtypes_leaves_no_trace() -> None:
    lif = snn.Leaky(0.9, init_hidden=True, output=True)
    before = dict(vars(lif)).keys(), lif.mem
    x = torch.rand(T, B, N).bfloat16()
    with ssp.sparse_mode():
        spk, mem = lif(x[0])
        spk, mem = lif(x[1])
        assert type(mem) is Recorded
        spk.sum().item()
    assert record_of(lif).calls == {"fused": 1}
    assert vars(lif).keys() - before[0] <= {"reset"}
    assert torch.equal(before[1], torch.zeros(0))


def test_a_loop_that_enters_and_leaves_autocast() -> None:
    torch.manual_seed(0)
    fc, lif = nn.Linear(N, N), snn.Leaky(0.5)
    x = (torch.rand(T, B, N) < 0.5).float()

    def run() -> Tensor:
        mem, out = torch.zeros(B, N), []
        for t, step in enumerate(x):
            with torch.autocast("cpu", torch.bfloat16, enabled=4 <= t < 8):
                _, mem = lif(fc(step), mem)
            out.append(mem)
        return torch.stack(out)

    expected = run()
    with ssp.sparse_mode():
        found = run()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
