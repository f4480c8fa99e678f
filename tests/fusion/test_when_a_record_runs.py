"""When a record runs, what it refuses, and what it leaves behind."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import snn_sparse_plugin as ssp
from snn_sparse_plugin.core import tally
from snn_sparse_plugin.core.errors import FusionError
from snn_sparse_plugin.fusion.arguments import ArgumentSeries
from snn_sparse_plugin.fusion.context import here
from snn_sparse_plugin.fusion.flush import flush
from snn_sparse_plugin.fusion.governor import backoff
from snn_sparse_plugin.fusion.record import AFTERWARDS, Record
from snn_sparse_plugin.fusion.recorded import Recorded
from snn_sparse_plugin.fusion.reuse import REUSES
from snn_sparse_plugin.fusion.series import stacked

snn = pytest.importorskip("snntorch")

ROOT = Path(__file__).parents[2]


def loop(lif: Any, x: Tensor, mem: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    mem, out = torch.zeros_like(x[0]) if mem is None else mem, []
    for step in x:
        spk, mem = lif(step, mem)
        out.append(spk)
    return out, mem


@pytest.fixture
def lif() -> Any:
    return snn.Leaky(0.875)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, 3, 4)


@pytest.fixture(autouse=True)
def _nothing_left() -> Any:
    tally.clear()
    yield
    assert here.record is None or here.record.closed or not here.record.awaited()


def fused(kind: str = "Leaky") -> int:
    return tally.by_class()[kind].calls.get("fused", 0) if kind in tally.by_class() else 0


def test_a_loop_is_one_call(lif: Any, x: Tensor) -> None:
    with ssp.sparse_mode():
        out, mem = loop(lif, x)
        assert {type(o) for o in [*out, mem]} == {Recorded}
        total = torch.stack(out).sum()
    assert {type(o) for o in [*out, mem, total]} == {Tensor}
    assert tally.by_class()["Leaky"].calls == {"fused": 1}


def test_leaving_the_block_runs_what_waits(lif: Any, x: Tensor) -> None:
    with ssp.sparse_mode():
        out, _ = loop(lif, x)
    assert type(out[0]) is Tensor
    assert torch.equal(torch.stack(out), torch.stack(loop(lif, x)[0]))


def test_switches(lif: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with ssp.sparse_mode(fuse_time=False):
        assert type(lif(x[0], x[0])[0]) is Tensor
    monkeypatch.setenv("SNN_SPARSE_FUSE", "0")
    with ssp.sparse_mode():
        assert type(lif(x[0], x[0])[0]) is Tensor
    assert not ssp.SparseConfig().fuse_time
    monkeypatch.setenv("SNN_SPARSE_FUSE", "1")
    assert ssp.SparseConfig().fuse_time


def by_class(every: Tensor, classes: int) -> Tensor:
    """A loss written out over the neurons of each class, as snnTorch's population code is."""
    counts = torch.zeros(every.shape[1], classes)
    for k in range(classes):
        counts[:, k] = every[:, :, k : k + 1].sum(-1).sum(0)
    return (counts.square().sum(0) * torch.arange(1.0, classes + 1)).sum()


def test_a_loss_in_many_calls_is_not_recorded(lif: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    longest, run = [], Record.close
    monkeypatch.setattr(Record, "close", lambda self: (longest.append(len(self.nodes)), run(self)))
    found = []
    for options in (None, {"backprop_threshold": None}):
        current = x.clone().requires_grad_()
        with ssp.sparse_mode(**options) if options else torch.enable_grad():
            loss = by_class(torch.stack(loop(lif, 2 * current)[0]), 4)
            loss.backward()
        found.append((loss.detach(), current.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)
    assert fused() == 1
    # the input, the neuron, the stack and the first calls behind it, of thirteen
    assert max(longest) <= 3 + AFTERWARDS + 2


def test_a_loss_of_each_step_is_recorded(lif: Any, x: Tensor) -> None:
    with ssp.sparse_mode():
        out, _ = loop(lif, x)
        loss = torch.zeros(())
        for spk in out:
            share = spk
            for k in range(AFTERWARDS + 2):
                share = share * (k + 1) + 0.5
            loss = loss + share.square().mean()
        assert type(loss) is Recorded
    assert fused() == 1


def test_calls_within_a_loop_and_between_stacks_are_recorded(lif: Any, x: Tensor) -> None:
    with ssp.sparse_mode():
        mem, out, mems = torch.zeros_like(x[0]), [], []
        for step in x:
            current = step
            spk, mem = lif(current, mem)
            for k in range(AFTERWARDS + 4):
                spk = spk * (k + 1)
            out.append(spk)
            mems.append(mem)
        total = torch.stack(out).square().mean(0) + torch.stack(mems).square().mean(0)
        assert type(total) is Recorded
        for _ in range(3):
            total = total * 2
        assert type(total) is Recorded
    assert fused() == 1


def test_max_steps(lif: Any, x: Tensor) -> None:
    with ssp.sparse_mode(max_steps=2):
        out, _ = loop(lif, x)
        assert [type(o) is Tensor for o in out] == [True] * 4 + [False] * 2
        assert fused() == 3
    with pytest.raises(ssp.ConfigError, match="max_steps must be None or a number of steps"):
        ssp.SparseConfig(max_steps=0)


@pytest.mark.parametrize("what", ["input", "parameter", "state"])
def test_a_change_in_place_before_the_run_is_an_error(lif: Any, x: Tensor, what: str) -> None:
    mem = torch.zeros(3, 4)
    with ssp.sparse_mode():
        out, last = loop(lif, x, mem)
        with torch.no_grad():
            {"input": x, "parameter": lif.beta, "state": mem}[what].mul_(0.5)
        where = r"changed in place after the step was recorded at .*test_when_a_record_runs.py:\d+, in loop"
        with pytest.raises(FusionError, match=where):
            out[0].tolist()
        with pytest.raises(FusionError, match="was never computed"):
            last.tolist()
        again, _ = loop(lif, x)  # nothing of it is left
        assert float(torch.stack(again).sum()) >= 0


def test_an_optimizer_step_runs_what_waits(x: Tensor) -> None:
    fc, lif = nn.Linear(4, 4), snn.Leaky(0.875)
    optimizer = torch.optim.SGD(fc.parameters(), lr=1.0)
    fc.weight.grad = torch.ones_like(fc.weight)
    with ssp.sparse_mode():
        out, _ = loop(lambda step, mem: lif(fc(step), mem), x)
        twin = copy.deepcopy(fc)
        optimizer.step()
    assert torch.equal(torch.stack(out), torch.stack(loop(lambda step, mem: lif(twin(step), mem), x)[0]))


def test_what_nobody_waits_for_is_let_go(lif: Any, x: Tensor) -> None:
    with ssp.sparse_mode():
        out, mem = loop(lif, x)
        record = here.record
        lif.mem = torch.zeros(0)  # snnTorch keeps the last membrane in the module, too
        del out, mem
        lif(x[0], torch.zeros(3, 4))  # the next loop begins
        assert record is not None
        assert record.closed
        assert not record.nodes
    assert fused() == 0


def test_watched_steps_run_although_nobody_waits(x: Tensor) -> None:
    net = nn.Sequential(snn.Leaky(0.875, init_hidden=True))
    with ssp.sparse_mode(), ssp.record_activity(net) as log:
        for step in x:
            net(step)
    assert [entry.steps for entry in log["0"]] == [6]


def test_threads_have_records_of_their_own(lif: Any, x: Tensor) -> None:
    found: list[Tensor] = []

    def work() -> None:
        with ssp.sparse_mode():
            found.append(torch.stack(loop(snn.Leaky(0.875), x)[0]))

    with ssp.sparse_mode():
        out, _ = loop(lif, x)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert type(out[0]) is Recorded
        assert torch.equal(found[0], torch.stack(out))


def test_another_thread_can_read(lif: Any, x: Tensor) -> None:
    found: list[float] = []
    with ssp.sparse_mode():
        out, _ = loop(lif, x)
        thread = threading.Thread(target=lambda: found.append(float(torch.stack(out).sum())))
        thread.start()
        thread.join()
    assert found == [float(torch.stack(out).sum())]


def test_single_steps_are_soon_not_recorded_any_more(lif: Any, x: Tensor) -> None:
    kinds, mem = [], torch.zeros(3, 4)
    with ssp.sparse_mode():
        for step in x:
            spk, mem = lif(step, mem)
            kinds.append(type(spk) is Recorded)
            spk.sum().item()
    assert kinds == [True, True, False, False, False, False]
    assert backoff[lif].left > 0


def test_values_behave_as_tensors(lif: Any, x: Tensor) -> None:
    def made() -> Any:
        return lif(x[0], torch.ones(3, 4))[1]

    expected = made()
    with ssp.sparse_mode():
        buffer = io.BytesIO()
        torch.save(made(), buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer), expected)
        assert repr(made()) == repr(expected)
        assert torch.equal(copy.deepcopy(made()), expected)
        assert made().tolist() == expected.tolist()
        assert (made().numpy() == expected.numpy()).all()
        assert bool((made() == expected).all())
        assert (made() == None) is False  # noqa: E711
        assert [row.shape for row in made()] == [(4,)] * 3
        assert float(torch.einsum("bn,bn->", made(), made())) == pytest.approx(float((expected**2).sum()))
        assert nn.Parameter(made()).is_leaf
        assert torch.equal(torch.jit.script(lambda_free)(made()), expected * 2)


def lambda_free(x: Tensor) -> Tensor:
    return x * 2


def test_an_error_of_a_step_is_raised_in_the_users_line(lif: Any, x: Tensor) -> None:
    fc = nn.Linear(5, 2)
    with ssp.sparse_mode():
        spk, _ = lif(x[0], x[0])
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            fc(spk)
        assert type(spk) is Tensor


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        lambda: torch.device("cpu"),  # a mode that sees every function
    ],
    ids=["hooks on saved tensors", "function mode"],
)
def test_steps_are_not_recorded_inside(context: Any, lif: Any, x: Tensor) -> None:
    with ssp.sparse_mode():
        with context():
            assert type(lif(x[0], x[0])[0]) is Tensor
        assert type(lif(x[0], x[0])[0]) is Recorded


def test_neurons_inside_a_custom_function(lif: Any, x: Tensor) -> None:
    class Outer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return lif(x, torch.zeros(3, 4))[1]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 3 * grad

    inputs = x[0].clone().requires_grad_()
    with ssp.sparse_mode():
        Outer.apply(inputs).sum().backward()
    assert torch.equal(inputs.grad, torch.full((3, 4), 3.0))


def test_a_state_changed_in_place_is_the_next_steps_state(lif: Any, x: Tensor) -> None:
    def run() -> tuple[Tensor, Tensor]:
        mem, out = torch.zeros(3, 4), []
        for step in x:
            spk, mem = lif(step, mem)
            mem *= 0.5
            out.append(spk)
        return torch.stack(out), mem

    expected = run()
    with ssp.sparse_mode():
        found = run()
        assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(not REUSES, reason="what C++ holds does not show in this torch's counts")
def test_a_loop_that_lets_go_gets_its_tensors_again(x: Tensor) -> None:
    first, second, seen = snn.Leaky(0.875), snn.Leaky(0.5), []

    def run() -> tuple[Tensor, Tensor]:
        one = two = torch.zeros(3, 4)
        kept = None
        for t, step in enumerate(x):
            spk, one = first(step, one)
            seen.append(id(spk))
            if t == 1:
                kept = spk
            spk, two = second(spk, two)
        return kept, two

    expected = run()
    seen.clear()
    with ssp.sparse_mode():
        found = run()
        assert all(map(torch.equal, found, expected))
    assert len(set(seen)) < len(seen)


def test_a_profiler_that_notes_shapes(lif: Any, x: Tensor) -> None:
    x = x.requires_grad_()
    with ssp.sparse_mode(), torch.profiler.profile(record_shapes=True):
        out, mem = loop(lif, x)
        (torch.stack(out).sum() + mem.sum()).backward()
    assert x.grad is not None
    assert type(mem) is Tensor


class Products(TorchDispatchMode):
    """Counts dense products while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::addmm", "aten::mm"):
            self.shapes.append(tuple(args[-2].shape))
        return func(*args, **(kwargs or {}))


def test_the_static_input_is_multiplied_once() -> None:
    fc, lif, image = nn.Linear(4, 5), snn.Leaky(0.875), torch.rand(3, 4)
    with ssp.sparse_mode():
        loop(lambda _, mem: lif(fc(image), mem), torch.zeros(3, 3, 5))[0][
            0
        ].tolist()  # fc is seen to feed a neuron
        out, _ = loop(lambda _, mem: lif(fc(image), mem), torch.zeros(6, 3, 5))
        with Products() as products:
            loss = torch.stack(out).sum()
        assert products.shapes == [(3, 4)]
        with Products() as products:
            loss.backward()
        assert len(products.shapes) == 1


def test_slices_and_stacks_are_not_copied(x: Tensor) -> None:
    argument = ArgumentSeries((step, step._version) for step in x)
    assert stacked(argument).data_ptr() == x.data_ptr()
    assert torch.equal(stacked(argument[::-1]), x.flip(0))


@pytest.mark.parametrize("together", [False, True])
def test_events_stay_events(monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    fc, lif = nn.Linear(4, 5), snn.Leaky(0.875)
    # few enough spikes for a dense tensor of them to be turned into events
    train = ssp.SpikeTrain.from_dense((torch.rand(6, 3, 4) < 0.2).float())
    made: list[Any] = []
    with ssp.sparse_mode():
        for again in (False, True):
            if again:  # the first loop has shown that the layer feeds a neuron
                if not together:
                    flush()
                monkeypatch.setattr(ssp.SpikeTrain, "from_dense", lambda *a, **k: made.append(a))
            mem, out = torch.zeros(3, 5), []
            for t in range(6):
                spk, mem = lif(fc(train.step(t)), mem)
                out.append(spk)
            found = torch.stack(out)
            found.sum()
    monkeypatch.undo()
    assert not made
    dense = train.to_dense()
    assert torch.equal(found, torch.stack(loop(lambda s, m: lif(fc(s), m), dense, torch.zeros(3, 5))[0]))


def test_run_a_script(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch, snntorch\n"
        "lif, mem, out = snntorch.Leaky(0.9), torch.zeros(2, 3), []\n"
        "for _ in range(5):\n"
        "    spk, mem = lif(torch.rand(2, 3, requires_grad=True), mem)\n"
        "    out.append(spk)\n"
        "torch.stack(out).sum().backward()\n"
        "print(sys.argv, __name__)\n"
    )

    def run(*args: str) -> Any:
        command = [sys.executable, "-m", "snn_sparse_plugin", "run", *args]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    done = run("--threshold", "exact", str(script), "--epochs", "3", "-m")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"['{script}', '--epochs', '3', '-m'] __main__"
    assert "Leaky   1 in 1  1 in 1" in done.stderr
    assert "5 neuron calls of step loops ran as 1 fused calls" in done.stderr
    assert "recorded steps ran for: sum (1)" in done.stderr or "backward (1)" in done.stderr
    script.write_text("raise SystemExit(3)")
    assert run("-q", str(script)).returncode == 3
    assert "there is no script" in run("nowhere.py").stderr
    module = run("-q", "-m", "timeit", "-n", "1", "pass")
    assert "1 loop" in module.stdout


def test_a_notebook_cell(capsys: pytest.CaptureFixture[str]) -> None:
    testing = pytest.importorskip("IPython.testing.globalipapp")
    shell = testing.start_ipython() or testing.get_ipython()
    shell.run_line_magic("load_ext", "snn_sparse_plugin")
    shell.run_cell_magic(
        "snn_sparse",
        "backprop_threshold=None",
        "import torch, snntorch\n"
        "lif, mem = snntorch.Leaky(0.9), torch.zeros(2, 3)\n"
        "for _ in range(4):\n"
        "    spk, mem = lif(torch.rand(2, 3), mem)\n"
        "total = spk.sum()",
    )
    assert "4 neuron calls of step loops ran as 1 fused calls" in capsys.readouterr().out
    assert type(shell.user_ns["total"]) is Tensor


def test_flush_by_hand(lif: Any, x: Tensor) -> None:
    with ssp.sparse_mode():
        out, _ = loop(lif, x)
        flush()
        assert type(out[0]) is Tensor
    gc.collect()
