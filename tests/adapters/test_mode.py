"""sparse_mode, sparsify, restore: who is sparse when, and that everything can be undone."""

from __future__ import annotations

import asyncio
import copy
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch import nn

snntorch = pytest.importorskip("snntorch")
norse = pytest.importorskip("norse.torch")
from snntorch import surrogate  # noqa: E402

import snn_sparse_plugin as ssp  # noqa: E402
from snn_sparse_plugin import (  # noqa: E402
    ConfigError,
    InputError,
    UnsupportedError,
    restore,
    sparse_mode,
    sparsify,
)
from snn_sparse_plugin.core.config import active_config  # noqa: E402

WINDOW = {"backprop_threshold": 0.1, "min_active": 0}


@pytest.fixture(autouse=True)
def _fresh():
    snntorch.SpikingNeuron.instances.clear()
    torch.manual_seed(0)


class Probe:
    """A single step of a neuron, and whether its gradient was masked."""

    def __init__(self, neuron):
        self.neuron, self.x = neuron, torch.randn(4, 200)

    def forward(self):
        x = self.x.clone().requires_grad_()
        state = torch.zeros(4, 200)
        if isinstance(self.neuron, snntorch.Leaky):
            return x, self.neuron(x, state)[0]
        return x, self.neuron(x)[0]

    def masked(self):
        x, out = self.forward()
        (grad,) = torch.autograd.grad(out.sum(), x)
        return bool((grad == 0).float().mean() > 0.5)


@pytest.fixture(params=["snntorch", "norse"])
def probe(request):
    if request.param == "snntorch":
        return Probe(snntorch.Leaky(0.9, spike_grad=surrogate.fast_sigmoid(25)))
    return Probe(norse.IAFCell(norse.IAFParameters(v_reset=torch.tensor(0.0))))


class TestSparseMode:
    def test_inside_only(self, probe):
        assert not probe.masked()
        with sparse_mode(**WINDOW):
            assert probe.masked()
        assert not probe.masked()

    def test_decided_in_forward(self, probe):
        with sparse_mode(**WINDOW):
            x, out = probe.forward()
        assert (torch.autograd.grad(out.sum(), x)[0] == 0).float().mean() > 0.5
        x, out = probe.forward()
        with sparse_mode(**WINDOW):
            assert (torch.autograd.grad(out.sum(), x)[0] == 0).float().mean() < 0.1

    def test_restored_after_an_exception(self, probe):
        with pytest.raises(KeyError, match="mine"), sparse_mode(**WINDOW):
            raise KeyError("mine")
        assert active_config() is None
        assert not probe.masked()

    def test_nested_blocks_start_from_the_outer_options(self, probe):
        with sparse_mode(**WINDOW, check=True) as outer:
            with sparse_mode(backprop_threshold=None) as inner:
                assert inner.check
                assert not probe.masked()
            assert active_config() == outer
            assert probe.masked()

    def test_other_threads_are_not_sparse(self, probe):
        seen = {}
        entered, done = threading.Event(), threading.Event()

        def inside():
            with sparse_mode(**WINDOW):
                entered.set()
                done.wait(10)
                seen["inside"] = probe.masked()

        thread = threading.Thread(target=inside)
        thread.start()
        assert entered.wait(10)
        seen["outside"] = probe.masked()
        done.set()
        thread.join()
        assert seen == {"inside": True, "outside": False}

    def test_a_thread_started_inside_enters_on_its_own(self, probe):
        seen = []
        with sparse_mode(**WINDOW):
            thread = threading.Thread(target=lambda: seen.append(probe.masked()))
            thread.start()
            thread.join()
        assert seen == [False]

    def test_asyncio_tasks_keep_apart(self, probe):
        async def sparse():
            with sparse_mode(**WINDOW):
                await asyncio.sleep(0)
                return probe.masked()

        async def plain():
            await asyncio.sleep(0)
            return probe.masked()

        async def both():
            return await asyncio.gather(sparse(), plain(), sparse())

        assert asyncio.run(both()) == [True, False, True]

    def test_one_block_after_the_other(self, probe):
        block = sparse_mode(**WINDOW)
        for _ in range(2):
            with block as config:
                assert active_config() is config
                assert probe.masked()
                with pytest.raises(UnsupportedError, match="call sparse_mode\\(\\) again"):
                    block.__enter__()
            assert not probe.masked()
            assert active_config() is None

    def test_as_a_decorator(self, probe):
        @sparse_mode(**WINDOW)
        def step():
            return probe.masked()

        assert [step(), probe.masked(), step()] == [True, False, True]

    def test_wrong_options(self):
        with pytest.raises(ConfigError, match="Did you mean 'min_active'"), sparse_mode(min_activ=0.1):
            pass
        with pytest.raises(ConfigError, match="backprop_threshold"), sparse_mode(backprop_threshold=-1.0):
            pass
        assert active_config() is None

    def test_upstream_names_are_not_rebound(self):
        leaky, lif = snntorch.Leaky, norse.LIF
        with sparse_mode():
            assert snntorch.Leaky is leaky
            assert norse.LIF is lif
            assert type(snntorch.Leaky(0.9)) is leaky

    @pytest.mark.parametrize("library", ["snntorch", "norse.torch"])
    def test_a_library_imported_inside_is_hooked(self, library):
        build = {
            "snntorch": "library.Leaky(0.9)(x, torch.zeros(4, 200))",
            "norse.torch": "library.IAFCell()(x)",
        }
        run(
            f"""
            import torch, snn_sparse_plugin
            x = torch.randn(4, 200, requires_grad=True)
            with snn_sparse_plugin.sparse_mode(backprop_threshold=0.1, min_active=0):
                import {library} as library
                out = {build[library]}[0]
            out.sum().backward()
            assert (x.grad == 0).float().mean() > 0.5
            """
        )


def run(code: str) -> None:
    """Run code in a process of its own; a failure shows its output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def mixed():
    return nn.ModuleDict(
        {
            "fc": nn.Linear(5, 4),
            "leaky": snntorch.Leaky(0.9),
            "lstm": snntorch.SLSTM(4, 4),
            "disabled": snntorch.SLSTM(4, 4, surrogate_disable=True),
            "lif": norse.LIF(),
            "coupled": norse.LIFMCRecurrentCell(4, 4),
            "readout": norse.LIBoxCell(),
        }
    )


class TestSparsify:
    def test_and_restore(self, probe):
        assert sparsify(probe.neuron, **WINDOW).names("fused") == [""]
        assert probe.masked()
        assert restore(probe.neuron) == [""]
        assert not probe.masked()

    def test_the_report_names_every_neuron_and_why(self):
        report = sparsify(mixed())
        assert report.names("fused") == ["leaky", "lif", "readout"]
        assert report.names("masked") == ["lstm", "coupled"]
        assert report.names("exact") == ["disabled"]
        text = str(report)
        assert "an LSTM cell makes its membrane" in text
        assert "no gradient" in text
        assert "fc" not in text

    def test_the_report_as_a_rich_table(self):
        from io import StringIO

        from rich.console import Console

        console = Console(file=StringIO(), width=120)
        console.print(sparsify(mixed()))
        assert "coupled by a matrix" in console.file.getvalue()

    def test_nothing_to_do(self):
        assert "no spiking neurons" in str(sparsify(nn.Linear(2, 2)))
        assert restore(nn.Linear(2, 2)) == []

    def test_twice_changes_the_options_only(self, probe):
        sparsify(probe.neuron, backprop_threshold=None)
        assert not probe.masked()
        before = dict(vars(probe.neuron))
        sparsify(probe.neuron, **WINDOW)
        assert probe.masked()
        assert vars(probe.neuron).keys() == before.keys()
        assert restore(probe.neuron) == [""]
        assert restore(probe.neuron) == []
        assert not probe.masked()

    def test_nothing_is_left_after_restore(self):
        model = mixed()
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        sparsify(model, **WINDOW)
        restore(model)
        assert {name: dict(vars(module)) for name, module in model.named_modules()} == before

    def test_options_of_the_model_stand_over_those_of_the_block(self, probe):
        sparsify(probe.neuron, **WINDOW)
        with sparse_mode(backprop_threshold=None):
            assert probe.masked()

    def test_options_left_open_follow_the_block(self, probe):
        sparsify(probe.neuron, min_active=0)
        with sparse_mode(backprop_threshold=0.1):
            assert probe.masked()
        with sparse_mode(backprop_threshold=None):
            assert not probe.masked()

    def test_wrong_options_change_nothing(self):
        model = mixed()
        with pytest.raises(ConfigError):
            sparsify(model, backprop_threshold="wide")
        assert restore(model) == []

    @pytest.mark.parametrize("function", [sparsify, restore])
    def test_something_else_than_a_module(self, function):
        with pytest.raises(InputError, match="takes a torch module, got int"):
            function(3)

    def test_classes_names_and_parameters_stay(self):
        model, plain = mixed(), mixed()
        text, kinds = repr(model), [type(m) for m in model.modules()]
        sparsify(model)
        assert repr(model) == text
        assert [type(m) for m in model.modules()] == kinds
        assert list(model.state_dict()) == list(plain.state_dict())
        plain.load_state_dict(model.state_dict())
        model.load_state_dict(plain.state_dict())

    def test_deepcopy_is_sparse_on_its_own(self, probe):
        sparsify(probe.neuron, **WINDOW)
        twin = Probe(copy.deepcopy(probe.neuron))
        assert twin.masked()
        restore(probe.neuron)
        assert twin.masked()
        assert not probe.masked()

    def test_a_norse_network_fuses_without_a_block(self):
        from snn_sparse_plugin.backends import calls

        net, x = norse.SequentialState(nn.Linear(5, 4), norse.LIF()), torch.rand(6, 2, 5)
        expected, _ = net(x)
        sparsify(net)
        calls.clear()
        net(x)
        assert sum(n for (_, direction), n in calls.items() if direction == "forward") == 1
        assert restore(net) == ["", "1"]
        calls.clear()
        assert torch.equal(net(x)[0], expected)
        assert not calls

    def test_a_neuron_with_its_own_forward_is_masked(self):
        cell = norse.LIFMCRecurrentCell(30, 30)
        x = (5 * torch.rand(4, 30)).requires_grad_()

        def zeros():
            z, _ = cell(x)
            return float((torch.autograd.grad(z.sum(), x)[0] == 0).float().mean())

        cell.input_weights = nn.Parameter(torch.eye(30))
        assert zeros() == 0
        sparsify(cell, backprop_threshold=1e-6, min_active=0)
        assert zeros() == 1
        restore(cell)
        assert zeros() == 0


def test_importing_stays_light():
    run(
        """
        import sys, snn_sparse_plugin
        heavy = {"snntorch", "norse", "triton", "matplotlib", "numba", "torchvision", "torch._dynamo"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        """
    )


def test_public_names():
    assert {"sparse_mode", "sparsify", "restore", "SparsityReport", "unroll"} <= set(ssp.__all__)
    assert all(hasattr(ssp, name) for name in ssp.__all__)
