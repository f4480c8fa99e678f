"""Run counts: every neuron call in sparse mode is counted once, on its module, in the way it ran."""

from __future__ import annotations

import copy
import gc
import sys
import threading

import pytest
import torch
from torch import nn

snntorch = pytest.importorskip("snntorch")
norse = pytest.importorskip("norse.torch")
from snntorch import surrogate  # noqa: E402

import snn_sparse_plugin as ssp  # noqa: E402
from snn_sparse_plugin import sparse_mode, sparsify  # noqa: E402
from snn_sparse_plugin.core import tally  # noqa: E402

WINDOW = {"backprop_threshold": 0.5, "min_active": 0}


@pytest.fixture(autouse=True)
def _from_zero():
    tally.clear()


def step(neuron: nn.Module, grad: bool = True) -> torch.Tensor:
    x = torch.rand(4, 30, requires_grad=grad)
    return neuron(x, torch.zeros(4, 30))[0] if isinstance(neuron, snntorch.Leaky) else neuron(x)[0]


CELLS = {
    "snntorch": lambda: snntorch.Leaky(0.9, spike_grad=surrogate.fast_sigmoid(25)),
    "norse": lambda: norse.IAFCell(),
    "norse, own forward": lambda: norse.CobaLIFCell(30, 30),
}


@pytest.mark.parametrize("build", CELLS.values(), ids=CELLS)
class TestOneStep:
    def run(self, build, *, grad=True, **options):
        neuron = build()
        report = sparsify(neuron, **options)
        out = step(neuron, grad)
        if grad:
            out.sum().backward()
        assert list(tally.by_class()) == [type(neuron).__name__]
        assert tally.by_class()[type(neuron).__name__].calls == report.runs()[""]
        return report.runs()[""]

    def test_masked(self, build):
        assert self.run(build, **WINDOW) == {"masked": 1, "backward": 1}

    def test_exact_mode(self, build):
        assert self.run(build, backprop_threshold=None) == {"exact": 1}

    def test_guard(self, build):
        assert self.run(build, backprop_threshold=1e-9, min_active=1) == {"exact": 1, "guard": 1}

    def test_without_gradient(self, build):
        with torch.no_grad():
            assert self.run(build, grad=False, **WINDOW) == {"no_grad": 1}

    def test_unsparse_calls_are_not_counted(self, build):
        step(build()).sum().backward()
        assert tally.by_class() == {}

    def test_in_a_block_without_sparsify(self, build):
        neuron = build()
        with sparse_mode(**WINDOW):
            kept = [step(neuron), step(neuron)]
        assert len(kept) == 2
        found = tally.by_class()[type(neuron).__name__]
        assert (found.calls, found.modules) == ({"masked": 2}, {"masked": 1})


class TestReasons:
    """They are those of now: what is set on a module after its first run shows."""

    def test_in_the_counts(self):
        neuron = snntorch.Leaky(0.9, init_hidden=True)
        with sparse_mode(**WINDOW):
            neuron(torch.rand(4, 30))
            assert tally.by_class()["Leaky"].reasons == {"called step by step": 1}
            neuron.state_quant = torch.round
            neuron(torch.rand(4, 30))
            (reason,) = tally.by_class()["Leaky"].reasons
            assert "state_quant" in reason
            neuron.state_quant = False
        assert tally.by_class()["Leaky"].reasons == {"called step by step": 1}

    def test_of_a_module_that_is_gone(self):
        neuron = snntorch.Leaky(0.9, init_hidden=True)
        snntorch.SpikingNeuron.instances.clear()
        with sparse_mode(**WINDOW):
            neuron(torch.rand(4, 30))
        del neuron
        gc.collect()
        assert tally.by_class()["Leaky"].reasons == {"called step by step": 1}

    def test_in_a_report(self):
        neuron = snntorch.Leaky(0.9, init_hidden=True)
        report = sparsify(neuron, **WINDOW)
        assert report.names("fused") == [""]
        neuron(torch.rand(4, 30))
        neuron.state_quant = torch.round
        assert "state_quant" in str(report)
        (row,) = report.as_dict()["rows"]
        assert row["status"] == "masked"
        assert row["ran"]
        assert report.names("masked") == [""]


def layers() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 5),
        snntorch.Leaky(0.9, init_hidden=True),
        nn.Linear(5, 4),
        snntorch.SLSTM(4, 4, init_hidden=True, output=True),
    )


class TestWholeNetworks:
    def test_fused_and_fallback(self):
        net = layers()
        report = sparsify(net, **WINDOW)
        spikes, *_ = ssp.unroll(net, (torch.rand(7, 2, 6) < 0.5).float())
        spikes.sum().backward()
        runs = report.runs()
        assert runs["1"] == {"fused": 1, "backward": 1}
        assert runs["3"]["masked"] == 7
        assert tally.by_class()["SLSTM"].reasons == {"an LSTM cell makes its membrane": 1}
        assert tally.by_class()["Leaky"].reasons == {}

    def test_fused_guard(self):
        net = nn.Sequential(*layers()[:2], nn.Linear(5, 3))
        report = sparsify(net, backprop_threshold=1e-9, min_active=1)
        ssp.unroll(net, torch.rand(7, 2, 6))[0].sum().backward()
        assert report.runs() == {"1": {"fused": 1, "guard": 1, "backward": 1}}

    def test_norse_sequence(self):
        last = norse.LSNN(record_states=True)
        net = norse.SequentialState(nn.Linear(6, 5), norse.LIF(), norse.Lift(nn.Linear(5, 4)), last)
        report = sparsify(net, **WINDOW)
        net(torch.rand(7, 2, 6))[0].sum().backward()
        runs = report.runs()
        assert (runs["1"]["fused"], runs["1"]["backward"]) == (1, 1)
        assert runs["3"]["masked"] == 7

    def test_a_sequence_module_that_steps(self):
        lif = norse.LIF()
        with sparse_mode(fuse_time=False, **WINDOW):
            lif(torch.rand(7, 2, 6, requires_grad=True))
        assert tally.by_class()["LIF"].calls == {"masked": 7}
        assert tally.by_class()["LIF"].reasons == {"fuse_time=False": 1}

    def test_outside_any_module(self):
        with sparse_mode(**WINDOW):
            norse.lif_step(
                torch.rand(2, 4),
                norse.LIFState(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)),
                torch.rand(3, 4, requires_grad=True),
                torch.rand(3, 3),
                norse.LIFParameters(),
            )
        (found,) = tally.by_class().values()
        assert (list(tally.by_class()), found.modules) == (["functional"], {})

    def test_spike_functions_called_without_fire(self):
        neuron = snntorch.LeakyParallel(6, 5)
        with sparse_mode(**WINDOW):
            neuron(torch.rand(7, 2, 6)).sum().backward()
        assert tally.by_class()["LeakyParallel"].calls == {"masked": 1, "backward": 1}

    def test_custom_surrogates_and_functorch(self):
        neuron = snntorch.Leaky(0.9, spike_grad=lambda x: torch.sigmoid(9 * x))
        with sparse_mode(**WINDOW):
            step(neuron)
            torch.func.grad(lambda x: neuron(x, torch.zeros(4, 30))[0].sum())(torch.rand(4, 30))
        assert tally.by_class()["Leaky"].calls == {"masked": 2}


class TestReport:
    def test_the_column_appears_with_the_first_run(self):
        from io import StringIO

        from rich.console import Console

        net = layers()
        report = sparsify(net, **WINDOW)
        assert "ran" not in str(report).split("\n")[0]
        ssp.unroll(net, torch.rand(7, 2, 6))
        assert str(report).split("\n")[0].endswith("ran")
        assert "fused 1" in str(report)
        console = Console(file=StringIO(), width=120)
        console.print(report)
        assert "masked 7" in console.file.getvalue()

    def test_a_copy_counts_for_itself(self):
        neuron = CELLS["snntorch"]()
        report = sparsify(neuron, **WINDOW)
        kept = step(copy.deepcopy(neuron))
        assert report.runs() == {"": {}}
        assert kept.requires_grad
        assert tally.by_class()["Leaky"].calls == {"masked": 1}

    def test_it_outlives_the_model(self):
        neuron = CELLS["norse"]()
        report = sparsify(neuron, **WINDOW)
        step(neuron).sum().item()
        key = id(neuron)
        assert key in tally._records
        del neuron
        gc.collect()
        assert key not in tally._records
        assert report.runs() == {"": {"masked": 1}}

    def test_records_can_be_pickled(self):
        import pickle

        neuron = CELLS["norse"]()
        report = sparsify(neuron, **WINDOW)
        step(neuron)
        assert pickle.loads(pickle.dumps(report)).runs() == report.runs()


class TestRecords:
    def test_threads(self):
        neuron, interval = CELLS["norse"](), sys.getswitchinterval()
        record = tally.of(neuron, lambda _: "")

        def count():
            for _ in range(2000):
                record.count("masked")

        threads = [threading.Thread(target=count) for _ in range(4)]
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert record.calls == {"masked": 8000}
        assert tally.by_class()["IAFCell"].calls == {"masked": 8000}

    def test_blocks_nest_and_end_with_an_exception(self):
        outer, inner = tally.Record("Outer"), tally.Record("Inner")
        outside = tally.current()
        with tally.running(outer):
            with tally.running(inner):
                assert tally.current() is inner
            assert tally.current() is outer
        with pytest.raises(KeyError), tally.running(inner):
            raise KeyError
        assert tally.current() is outside

    def test_an_adapter_that_fails_is_no_reason_to_fail(self, monkeypatch):
        from snn_sparse_plugin.adapters.norse import NorseAdapter

        def broken(self, module):
            raise RuntimeError

        cell = norse.IAFCell()
        monkeypatch.setattr(NorseAdapter, "neuron", broken)
        with sparse_mode(**WINDOW):
            step(cell).sum().item()
        assert tally.by_class()["IAFCell"].reasons == {"its adapter failed with RuntimeError": 1}

    def test_legend_and_next_steps(self):
        net = nn.Sequential(
            nn.Linear(6, 5),
            snntorch.Leaky(0.9, init_hidden=True),
            nn.Linear(5, 5),
            snntorch.Leaky(0.9, init_hidden=True, state_quant=lambda x: x),
            nn.Linear(5, 3),
            snntorch.Leaky(0.9, init_hidden=True, output=True),
        )
        report = sparsify(net, **WINDOW)
        before = str(report)
        assert "fused   its steps can run as one call" in before
        assert "ran " not in before
        for now in torch.rand(4, 2, 6):
            net(now)[0].sum().item()  # asks for every step's number
        shown = str(report)
        assert "ran no_grad" not in shown
        assert "ran masked  single steps of upstream's own forward" in shown
        todo = shown.split("next steps:\n")[1].splitlines()
        assert [line.split()[0] for line in todo] == ["1", "3", "5"]
        assert "read it after the loop, or use unroll" in todo[0]
        assert "`snn-sparse supported`" in todo[1]

    def test_the_next_step_of_a_class_of_ones_own_is_to_write_its_equations(self):
        class Doubled(snntorch.Leaky):
            def forward(self, x, mem=None):
                return super().forward(2 * x, mem)

        assert "(snn_sparse_plugin.Equations)" in str(sparsify(Doubled(0.9)))

    def test_what_runs_fused_has_no_next_step(self):
        net = layers()[:2]
        report = sparsify(net, backprop_threshold=None)
        ssp.unroll(net, torch.rand(7, 2, 6))
        assert "ran fused" in str(report)
        assert "next steps" not in str(report)

    def test_html_for_notebooks(self):
        net = nn.Sequential(nn.Linear(6, 5), snntorch.Leaky(0.9, spike_grad=lambda x: (x > 0).float()))
        html = sparsify(net)._repr_html_()
        assert "<td>Leaky</td>" in html
        assert "&lt;lambda&gt;" in html
        assert "<li><b>1</b>: if its spike function depends on nothing but x" in html
        assert sparsify(nn.Linear(2, 2))._repr_html_() == "no spiking neurons of a supported library found"
