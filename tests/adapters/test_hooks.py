"""Other people's patches beside our hooks."""

from __future__ import annotations

import subprocess
import sys
from functools import wraps
from textwrap import dedent
from unittest import mock

import pytest
import snntorch
import torch
from torch import nn

from snn_sparse_plugin import registry, sparse_mode, sparsify
from snn_sparse_plugin.adapters import adapter_of


def loop(lif: nn.Module, steps: int = 10) -> None:
    torch.manual_seed(0)
    fc = nn.Linear(20, 16)
    with torch.no_grad(), sparse_mode(backprop_threshold=None):
        mem, out = torch.zeros(1), []
        for frame in (torch.rand(steps, 4, 20) < 0.5).float():
            spk, mem = lif(fc(frame), mem)
            out.append(spk)
        torch.stack(out).sum().item()


@pytest.fixture
def lif():
    neuron = snntorch.Leaky(0.9)
    loop(neuron)  # the hooks are in
    return neuron


@pytest.mark.parametrize("place", ["class", "instance"])
def test_a_wrapper_that_copies_our_marks_acts_at_every_step(lif, place, monkeypatch):
    calls = []
    owner = snntorch.Leaky if place == "class" else lif
    upstream = owner.forward

    @wraps(upstream)
    def counted(*args, **kwargs):
        calls.append(1)
        return upstream(*args, **kwargs)

    monkeypatch.setattr(owner, "forward", counted)
    loop(lif)
    assert len(calls) == 10
    assert "forward()" in str(sparsify(lif))


def test_a_module_is_fused_again_once_a_patch_is_gone(lif):
    upstream = snntorch.Leaky.forward
    report = sparsify(lif)
    with mock.patch.object(snntorch.Leaky, "forward", lambda self, *a, **k: upstream(self, *a, **k)):
        loop(lif)
        assert "its forward() was patched by" in str(report)
    before = report.runs()[""].get("fused", 0)
    loop(lif)
    assert report.runs()[""]["fused"] == before + 1


@pytest.mark.parametrize("library", ["snntorch", "norse"])
def test_hooks_come_back_after_a_patch_that_was_there_first(library):
    """In a process of its own, as the first sparse block decides."""
    code = f"""
        import torch, snntorch, norse.torch as norse, snn_sparse_plugin as ssp
        from unittest import mock
        cls, new = {{
            "snntorch": (snntorch.Leaky, lambda: snntorch.Leaky(beta=0.9)),
            "norse": (norse.LIFBoxCell, lambda: norse.LIFBoxCell()),
        }}[{library!r}]
        neuron = new()
        def loop():
            with torch.no_grad(), ssp.sparse_mode(backprop_threshold=None):
                state, out = (torch.zeros(1) if {library!r} == "snntorch" else None), []
                for x in torch.rand(10, 4, 20):
                    spikes, state = neuron(x, state)
                    out.append(spikes)
                float(torch.stack(out).sum())
        old = cls.forward
        with mock.patch.object(cls, "forward", lambda self, *a, **k: old(self, *a, **k)):
            loop()
            assert "patched by" in str(ssp.sparsify(neuron)), ssp.sparsify(neuron)
        report = ssp.sparsify(neuron)
        loop()
        assert report.runs()[""].get("fused") == 1, report
    """
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_loop_fuses_where_apply_is_a_method_of_cpp():
    """As from torch 2.14 on; a function of the user's own on recorded spikes takes their numbers."""
    code = """
        import torch, snntorch
        from torch.autograd import Function
        Function.apply = torch._C._FunctionBase.__dict__["apply"]
        assert not hasattr(Function.__dict__["apply"], "__func__")
        import snn_sparse_plugin as ssp

        class Doubled(Function):
            @staticmethod
            def forward(ctx, x):
                return 2 * x

            @staticmethod
            def backward(ctx, grad):
                return 2 * grad

        def loop(x):
            x, out, mem = x.clone().requires_grad_(), [], torch.zeros(4, 20)
            for step in x:
                spikes, mem = neuron(step, mem)
                out.append(spikes)
            loss = Doubled.apply(torch.stack(out)).sum()
            loss.backward()
            return loss.item(), x.grad

        neuron, x = snntorch.Leaky(beta=0.5), torch.rand(10, 4, 20)
        loss, grad = loop(x)
        report = ssp.sparsify(neuron, backprop_threshold=None)
        with ssp.sparse_mode(backprop_threshold=None):
            found, found_grad = loop(x)
        assert report.runs()[""].get("fused") == 1, report
        assert found == loss > 0
        torch.testing.assert_close(found_grad, grad)
    """
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [{}, {"reset_delay": False}, {"reset_mechanism": "zero"}], ids=str)
@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("name", ["Leaky", "Lapicque", "Synaptic", "Alpha", "RLeaky", "RSynaptic"])
def test_attributes_after_a_loop_are_upstreams(name, steps, options):
    if "reset_delay" in options and name in ("Lapicque", "Alpha", "RSynaptic"):
        pytest.skip("has no such option")
    first = {"Synaptic": {"alpha": 0.8}, "RSynaptic": {"alpha": 0.8}, "Alpha": {"alpha": 0.95}}.get(name, {})
    more = {"linear_features": 16} if name.startswith("R") else {}

    def made(sparse: bool) -> nn.Module:
        torch.manual_seed(0)
        fc, lif = (
            nn.Linear(20, 16),
            getattr(snntorch, name)(beta=0.9, init_hidden=True, **first, **more, **options),
        )
        nn.init.uniform_(fc.weight, -1, 1)
        x = (torch.rand(steps, 4, 20) < 0.5).float()
        if sparse:
            with sparse_mode(backprop_threshold=None):
                assert not hasattr(lif, "reset")
                spikes = [lif(fc(frame)) for frame in x]
                now = lif.reset  # while the steps are recorded
                torch.stack(spikes).sum().item()
                assert lif.reset is now
        else:
            for frame in x:
                lif(fc(frame))
        return lif

    want, got = made(False), made(True)
    held = [{**vars(neuron), **neuron._buffers} for neuron in (want, got)]
    assert held[0].keys() == held[1].keys()
    for key, value in held[0].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(held[1][key], value, rtol=1e-5, atol=1e-5, msg=key)
            assert held[1][key].requires_grad == value.requires_grad, key
    assert torch.equal(got.reset, want.reset)


def test_the_reset_of_a_fused_loop_keeps_no_events_alive():
    first, second = (snntorch.Leaky(beta=0.9) for _ in range(2))
    layer, mems = nn.Linear(8, 8), [torch.zeros(1), torch.zeros(1)]
    with sparse_mode():
        for x in (torch.rand(6, 3, 8) < 0.5).float():
            spikes, mems[0] = first(4 * x, mems[0])
            spikes, mems[1] = second(layer(spikes), mems[1])
        spikes.sum().item()
    for neuron in (first, second):
        assert neuron.reset.shape == (3, 8)
        assert not vars(neuron.reset)
        assert neuron.reset.untyped_storage().nbytes() == 3 * 8 * 4


@pytest.mark.parametrize("noted", [True, False])
def test_an_adapter_that_notes_no_hooks_is_asked_at_every_block(noted, monkeypatch):
    adapter = type(adapter_of(snntorch.Leaky(0.5)))
    asked = []
    monkeypatch.setattr(adapter, "noted", noted)
    monkeypatch.setattr(adapter, "repair", lambda self: asked.append(self))
    registry.refresh()
    try:
        with sparse_mode():
            asked.clear()
        for _ in range(2):
            with sparse_mode():
                pass
        assert len(asked) == (0 if noted else 2)
    finally:
        registry.refresh()
