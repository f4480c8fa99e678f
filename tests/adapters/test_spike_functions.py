"""Spike functions that are more than a formula of x: only upstream calls them, with upstream's gradients."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import snntorch
import torch
from snntorch import surrogate
from torch import nn

import snn_sparse_plugin as ssp
from snn_sparse_plugin import Surrogate, sparse_mode, sparsify


def soft(x, slope):
    smooth = torch.sigmoid(slope * x)
    return ((x > 0).float() - smooth).detach() + smooth


class Learnable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return soft(x, self.slope)


class Scheduled:
    """Another slope at each call; a list of the shapes that it was called with."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []

    def __call__(self, x):
        self.shapes.append(x.shape)
        return soft(x, 1.0 + len(self.shapes))


@dataclass
class WithoutHash:
    slope: float = 4.0

    def __call__(self, x):
        return soft(x, self.slope)


class LiveSlope(torch.autograd.Function):
    slope = 2.0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.slope = LiveSlope.slope
        return (x > 0).float()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1 + ctx.slope * x.abs()) ** 2


class Noisy:
    def __call__(self, x):
        return soft(x + 0.1 * torch.rand(x.shape), 5.0)


def run(context: Any, function: Any, during: Any = lambda function, step: None) -> dict[str, Any]:
    torch.manual_seed(0)
    fc, lif = nn.Linear(20, 16), snntorch.Leaky(0.9, spike_grad=function)
    x = (torch.rand(9, 4, 20) < 0.5).float()
    with context:
        mem, out = torch.zeros(1), []
        for step, frame in enumerate(x):
            during(function, step)
            spk, mem = lif(fc(frame), mem)
            out.append(spk)
        loss = torch.stack(out).pow(2).mean()
        during(function, 50)
        loss.backward()
    found = {"spikes": torch.stack(out).detach(), "weight": fc.weight.grad, "drawn": torch.rand(3)}
    if isinstance(function, nn.Module):
        found["slope"] = function.slope.grad
    if isinstance(function, Scheduled):
        found["shapes"] = function.shapes
    return found


def set_cell(function, step):
    function.__closure__[0].cell_contents = 1.0 + step


def set_class(function, step):
    LiveSlope.slope = 1.0 + step


CASES = {
    "a module with a parameter": (Learnable, None),
    "another slope at each call": (Scheduled, None),
    "a class whose slope changes": (lambda: LiveSlope.apply, set_class),
    "the closure of snnTorch's own": (lambda: surrogate.fast_sigmoid(3), set_cell),
    "no hash": (WithoutHash, None),
    "noise": (Noisy, None),
    "upstream's stochastic operator": (surrogate.SSO, None),
    "partial": (lambda: partial(soft, slope=3.0), None),
    "lambda": (lambda: lambda x: soft(x, 3.0), None),
    "snnTorch's custom": (lambda: surrogate.custom_surrogate(lambda x, grad, out: grad * (1 + out)), None),
}


@pytest.mark.parametrize("fuse", [True, False], ids=["recorded", "stepped"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [None, "auto"], ids=["exact", "auto"])
def test_gradients_values_and_random_numbers_are_upstreams(case, fuse, window):
    make, during = CASES[case]
    during = during or (lambda function, step: None)
    if window == "auto" and "snnTorch's own" in case:
        pytest.skip("a known formula has a window")
    want = run(nullcontext(), make(), during)
    got = run(sparse_mode(backprop_threshold=window, fuse_time=fuse), make(), during)
    assert want.keys() == got.keys()
    assert float(want["weight"].abs().sum()) > 0
    for name, value in want.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-7, msg=name)
        else:
            assert got[name] == value, name


def test_a_window_masks_x_and_leaves_parameters_their_gradient():
    want = run(sparse_mode(backprop_threshold=0.3, min_active=0, fuse_time=False), Learnable())
    got = run(sparse_mode(backprop_threshold=0.3, min_active=0), Learnable())
    exact = run(nullcontext(), Learnable())
    for name in ("weight", "slope"):
        torch.testing.assert_close(got[name], want[name])
    torch.testing.assert_close(got["slope"], exact["slope"])
    assert not torch.allclose(got["weight"], exact["weight"])


def test_unroll_calls_it_as_the_loop_does():
    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 16), snntorch.Leaky(0.9, spike_grad=Learnable(), init_hidden=True))

    x, grads = (torch.rand(9, 4, 20) < 0.5).float(), []
    loop, unrolled = made(), made()
    torch.stack([loop(frame) for frame in x]).mean().backward()
    ssp.unroll(unrolled, x, backprop_threshold=None).spikes.mean().backward()
    grads = [net[1].spike_grad.slope.grad for net in (loop, unrolled)]
    torch.testing.assert_close(*grads)


def test_asking_what_runs_calls_nobody():
    function = Scheduled()
    report = sparsify(snntorch.Leaky(0.9, spike_grad=function))
    assert "Scheduled is none of snnTorch's" in str(report)
    assert not function.shapes


def test_a_pure_function_of_ones_own_is_fused_where_it_is_declared_so():
    want = run(nullcontext(), partial(soft, slope=3.0))
    declared = Surrogate("custom", function=partial(soft, slope=3.0))
    with sparse_mode(backprop_threshold=None):
        found = run(nullcontext(), declared)
    torch.testing.assert_close(found["weight"], want["weight"], rtol=1e-4, atol=1e-7)
    assert sparsify(snntorch.Leaky(0.9, spike_grad=declared)).names("fused") == [""]


def test_a_derivative_put_in_place_of_snntorchs_is_the_users(monkeypatch):
    monkeypatch.setattr(surrogate.FastSigmoid, "backward", staticmethod(lambda ctx, grad: (grad * 7, None)))
    want = run(nullcontext(), surrogate.fast_sigmoid(3))
    got = run(sparse_mode(backprop_threshold=None), surrogate.fast_sigmoid(3))
    torch.testing.assert_close(got["weight"], want["weight"])


def test_a_tensor_for_a_slope_is_read_at_each_step():
    def during(function, step):
        function.__closure__[0].cell_contents.fill_(1.0 + step)

    def made():
        return surrogate.fast_sigmoid(torch.tensor(3.0))

    want = run(nullcontext(), made(), during)
    got = run(sparse_mode(backprop_threshold=None), made(), during)
    torch.testing.assert_close(got["weight"], want["weight"])


@pytest.mark.parametrize("what", ["threshold", "backward"])
def test_a_threshold_put_in_place_of_norses_is_the_users(what, monkeypatch):
    norse = pytest.importorskip("norse.torch")
    from norse.torch.functional import lif_box
    from norse.torch.functional.superspike import SuperSpike

    def run_norse(context):
        x = (torch.arange(60.0).view(5, 3, 4) / 5).requires_grad_()
        cell = norse.LIFBoxCell(norse.LIFBoxParameters(tau_mem_inv=torch.tensor(200.0)))
        with context:
            state, out = None, []
            for frame in x:
                spikes, state = cell(frame, state)
                out.append(spikes)
            torch.stack(out).sum().backward()
        return torch.stack(out).detach(), x.grad

    plain = run_norse(sparse_mode(backprop_threshold=None))
    if what == "threshold":
        monkeypatch.setattr(lif_box, "threshold", lambda x, method, alpha: soft(x - 0.2, 3.0))
    else:
        monkeypatch.setattr(SuperSpike, "backward", staticmethod(lambda ctx, grad: (grad * 7, None)))
    want, got = run_norse(nullcontext()), run_norse(sparse_mode(backprop_threshold=None))
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(b, a)
    assert not torch.equal(plain[1], got[1])


class Empty(Noisy):
    def __len__(self) -> int:
        return 0


@pytest.mark.parametrize("neuron", [snntorch.Leaky, snntorch.DeltaLeaky])
def test_a_spike_function_that_counts_as_false_is_one(neuron):
    found = []
    for context in (nullcontext(), sparse_mode(backprop_threshold=None)):
        torch.manual_seed(0)
        x, lif = torch.rand(3, 4, 5).requires_grad_(), neuron(beta=0.9, spike_grad=Empty(), init_hidden=True)
        with context:
            out = [lif(frame * 2) for frame in x]
            sum((o[0] if isinstance(o, tuple) else o).sum() for o in out).backward()
        found.append(x.grad)
    assert float(found[0].abs().sum()) > 0
    torch.testing.assert_close(found[1], found[0])


def test_a_spike_function_swapped_in_the_loop_is_used_from_then_on():
    def during_of(lif):
        return lambda step: setattr(
            lif, "spike_grad", surrogate.fast_sigmoid(2 + step) if step < 6 else Learnable()
        )

    grads = []
    for context in (nullcontext(), sparse_mode(backprop_threshold=None)):
        torch.manual_seed(0)
        fc, lif, mem, out = nn.Linear(20, 16), snntorch.Leaky(0.9), torch.zeros(1), []
        x, swap = (torch.rand(9, 4, 20) < 0.5).float(), during_of(lif)
        with context:
            for step, frame in enumerate(x):
                swap(step)
                spk, mem = lif(fc(frame), mem)
                out.append(spk)
            torch.stack(out).pow(2).mean().backward()
        grads.append(fc.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-7)
