"""Events of an input that are looked for while the loop is still being recorded: the same, or dropped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import on_grid, spikes, torch_threads
from torch import Tensor, nn

import snn_sparse_plugin as ssp
from snn_sparse_plugin.backends.cpu import ahead, threads
from snn_sparse_plugin.backends.cpu.ahead import Ahead
from snn_sparse_plugin.backends.cpu.events import events_from_dense
from snn_sparse_plugin.core.errors import FusionError
from snn_sparse_plugin.fusion.ahead import ENOUGH, SMALLEST
from snn_sparse_plugin.fusion.arguments import ArgumentSeries, Slices
from snn_sparse_plugin.fusion.context import here

snn = pytest.importorskip("snntorch")

T, B, M, DENSE = 24, 48, 350, 0.4  # M is no multiple of a vector
assert B * M >= SMALLEST


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    with torch_threads(2):
        yield


def same(found: Any, expected: Any) -> bool:
    return all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b))
        for a, b in zip(found, expected, strict=True)
    )


# --- the search itself ---


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("announced", [9, T])
@pytest.mark.parametrize("kind", ["spikes", "graded", "silent", "one dense sample"])
def test_the_events_are_those_of_the_conversion(kind: str, announced: int, finished: bool) -> None:
    x = spikes(T, B, M) if kind != "silent" else torch.zeros(T, B, M)
    if kind == "graded":
        x *= torch.rand(T, B, M)
    if kind == "one dense sample":
        x[:, 3] = 1
    begun = Ahead(x, 8, DENSE)
    for t in range(8, announced + 1):
        begun.announce(t)
    if finished:
        begun.finish(announced)
    expected = events_from_dense(x)
    assert same(events_from_dense(x, begun), expected)
    assert same(events_from_dense(x, begun), expected)  # another reader of the same input


def test_what_was_announced_is_found_by_the_other_thread() -> None:
    x = spikes(T, B, M)
    begun = Ahead(x, 8, DENSE)
    begun.announce(T)
    _wait(lambda: begun._claimed.locked())
    counts = torch.zeros(T * B, dtype=torch.int32).numpy()
    parts = begun.end(x.reshape(T * B, M).numpy(), counts)
    assert [(p.first, p.last) for p in parts[:1]] == [(0, 4 * B)]
    assert len(parts) == 2
    assert (counts[: parts[-1].last] == (x.reshape(T * B, M)[: parts[-1].last] != 0).sum(1).numpy()).all()


@pytest.mark.parametrize("steps", [T, 11])
def test_all_steps_are_put_in_order(steps: int) -> None:
    x = spikes(T, B, M)
    begun = Ahead(x, 8, DENSE)
    _wait(lambda: begun._claimed.locked())
    begun.announce(steps - 1)
    begun.finish(steps)
    found = begun.ordered(x[:steps].reshape(-1, M).numpy(), steps)
    if found is None:  # the other thread came too late
        assert begun._parts is not None
        assert begun._parts[-1].last < steps * B
        return
    assert same([torch.from_numpy(a) for a in found[:2]], events_from_dense(x[:steps])[:2])
    assert found[2]
    assert begun.ordered(x.reshape(-1, M).numpy(), T) is None or steps == T


def _wait(until: Callable[[], bool]) -> None:
    import time

    end = time.monotonic() + 20
    while not until():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.001)


def test_steps_that_are_not_wanted_and_other_memory() -> None:
    x = spikes(T, B, M)
    begun = Ahead(x, T, DENSE)
    _wait(lambda: begun._claimed.locked())
    for other in (x[: T // 4], x.clone(), x.double(), x[..., : M // 2]):
        assert same(events_from_dense(other, begun), events_from_dense(other))


@pytest.mark.parametrize("where", [0, 12])
def test_an_input_that_is_too_dense(where: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "LARGEST", 1000)
    x = spikes(T, B, M, p=0.02)
    x[where:] = 1
    begun = Ahead(x, 8, DENSE)
    begun.announce(T)
    assert same(events_from_dense(x, begun), events_from_dense(x))


def test_a_failing_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    began = []

    def fails(*_: Any) -> None:
        began.append(1)
        raise MemoryError

    monkeypatch.setattr(ahead, "_follow", fails)
    x = spikes(T, B, M)
    begun = Ahead(x, 8, DENSE)
    _wait(lambda: bool(began))
    assert same(events_from_dense(x, begun), events_from_dense(x))
    assert threads.parallel([lambda: 1, lambda: 2, lambda: 3]) == [1, 2, 3]  # the thread lives


def test_a_thread_that_never_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[Callable[[], None]] = []
    monkeypatch.setattr(ahead, "aside", waiting.append)
    x = spikes(T, B, M)
    begun = Ahead(x, 8, DENSE)
    begun.announce(T)
    assert same(events_from_dense(x, begun), events_from_dense(x))
    waiting[0]()  # too late
    assert begun._words[ahead._DONE] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_does_not_wait_for_a_thread_it_does_not_have() -> None:
    x = spikes(T, B, M)
    expected = events_from_dense(x)
    begun = Ahead(x, 8, DENSE)
    _wait(lambda: begun._claimed.locked())
    child = os.fork()
    if not child:
        found = events_from_dense(x, begun)
        os._exit(
            0
            if all((a.numpy() == b.numpy()).all() for a, b in zip(found[:2], expected[:2], strict=True))
            else 1
        )
    assert os.waitpid(child, 0)[1] == 0
    assert same(events_from_dense(x, begun), expected)


def test_the_memory_stays() -> None:
    x = spikes(T, B, M)
    twin = x.clone()
    begun = Ahead(x, 8, DENSE)
    with pytest.raises(RuntimeError, match="resiz"):
        x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="resiz"):
        x.resize_(2 * T, B, M)
    x.set_()
    begun.announce(T)
    del x
    rows = begun._rows
    assert same(events_from_dense(torch.from_numpy(rows).view(T, B, M), begun), events_from_dense(twin))


# --- in a step loop ---


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(M, 10), snn.Leaky(0.875)
        with torch.no_grad():
            self.fc.weight.copy_(on_grid(10, M))
            self.fc.bias.copy_(on_grid(10))

    def forward(self, x: Tensor, steps: int = T) -> Tensor:
        mem, out = self.lif.reset_mem(), []
        for t in range(steps):
            spk, mem = self.lif(self.fc(x[t]), mem)
            out.append(spk)
        return torch.stack(out)


@pytest.fixture
def net() -> Net:
    """A network whose first layer is known to feed neurons."""
    made = Net()
    with ssp.sparse_mode():
        made(torch.zeros(4, B, M), 4).sum().item()
    return made


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Ahead]:
    """Every search that begins."""
    made: list[Ahead] = []
    upstream = Ahead.__init__

    def init(self: Ahead, *args: Any) -> None:
        made.append(self)
        upstream(self, *args)

    monkeypatch.setattr(Ahead, "__init__", init)
    return made


def result(net: Net, run: Callable[[], list[Tensor]], fuse: bool) -> list[Tensor]:
    net.zero_grad()
    with ssp.sparse_mode(backprop_threshold=None, fuse_time=fuse):
        found = run()
        sum((s * torch.arange(s.numel()).view_as(s) % 7).sum() for s in found).backward()  # type: ignore[union-attr]
    return [s.detach() for s in found] + [p.grad for p in net.parameters()]  # type: ignore[misc]


def _early(net: Net, x: Tensor) -> list[Tensor]:
    return [net(x, T // 2)]


def _changed_after_use(net: Net, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = net(x)
    out.sum().item()
    x.copy_(x.roll(1, 0))
    return [out, net(x)]


LOOPS: dict[str, tuple[Callable[[Net, Tensor], list[Tensor]], int]] = {
    "all steps": (lambda net, x: [net(x)], 1),
    "a part of them": (_early, 1),
    "few": (lambda net, x: [net(x, ENOUGH - 1)], 0),
    "one tensor, other lengths": (lambda net, x: [net(x, T), net(x, T - 5)], 1),
    "the later half": (lambda net, x: [net(x[T // 2 :], T // 2)], 1),
    "twice": (lambda net, x: [net(x), net(x[:12].clone(), 12)], 1),
    "changed after use": (_changed_after_use, 2),
    "backwards": (lambda net, x: [net(x.flip(0))], 1),
    "not contiguous": (lambda net, x: [net(x.transpose(0, 1).contiguous().transpose(0, 1))], 0),
    "every other step": (lambda net, x: [net(x[::2], T // 2)], 0),
    "too dense": (lambda net, x: [net(x + (x == 0))], 1),
    "features cut": (lambda net, x: [net(torch.cat([x, x], 2)[..., :M])], 0),
    "then another tensor": (lambda net, x: [net([*x[:12], *x[:12].clone()])], 1),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_gives_what_it_gives_without(name: str, net: Net, begun: list[Ahead]) -> None:
    run, searches = LOOPS[name]
    x = spikes(T, B, M, p=0.05)
    expected = result(net, lambda: run(net, x.clone()), fuse=False)
    found = result(net, lambda: run(net, x.clone()), fuse=True)
    assert len(begun) == searches
    outputs = len(expected) - 2
    assert all(map(torch.equal, found[:outputs], expected[:outputs]))
    for a, b in zip(found[outputs:], expected[outputs:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_the_result_is_used(net: Net, begun: list[Ahead]) -> None:
    with ssp.sparse_mode():
        net(spikes(T, B, M)).sum().item()
    assert begun[0]._parts is not None


def test_a_change_in_place_is_an_error_and_ends_the_search(net: Net, begun: list[Ahead]) -> None:
    x = spikes(T, B, M)
    with ssp.sparse_mode():
        out = net(x)
        x[T - 1, 0, 0] = 3
        with pytest.raises(FusionError, match="changed in place"):
            out.sum().item()
    assert begun[0]._words[ahead._STOP] == -1
    assert begun[0]._parts is None


def test_a_change_before_enough_steps_is_an_error_too(net: Net, begun: list[Ahead]) -> None:
    x = spikes(T, B, M)
    with ssp.sparse_mode():
        mem = net.lif.reset_mem()
        for t in range(T):
            if t == ENOUGH - 2:
                x[0] = 0
            spk, mem = net.lif(net.fc(x[t]), mem)
        with pytest.raises(FusionError, match="changed in place"):
            spk.sum().item()
    assert not begun


def test_a_dropped_record_ends_the_search(net: Net, begun: list[Ahead]) -> None:
    with ssp.sparse_mode():
        out = net(spikes(T, B, M))
        del out
        net.lif.reset_mem()
        record = here.record
    assert begun[0]._words[ahead._STOP] == -1
    assert begun[0]._parts is None
    assert record is not None
    assert record.closed


@pytest.mark.parametrize(
    "why", ["one thread", "gradient", "autocast", "backend", "small", "current", "in a list"]
)
def test_where_none_begins(why: str, net: Net, begun: list[Ahead]) -> None:
    x, options, context = spikes(T, B, M), {}, contextlib.nullcontext()
    if why == "one thread":
        torch.set_num_threads(1)
    if why == "gradient":
        x.requires_grad_()
    if why == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)  # type: ignore[assignment]
    if why == "backend":
        options = {"backend": "reference"}
    if why == "small":
        x = x[:, :8].clone()
    if why == "current":
        net.fc.register_forward_hook(lambda module, args, out: torch.relu(out))
    if why == "in a list":
        x = [step.clone() for step in x]  # type: ignore[assignment]
    with ssp.sparse_mode(**options), context:
        net(x).sum().item()
    assert not begun


# --- slices as a argument ---


def test_a_column_of_slices() -> None:
    x = torch.rand(9, 2, 3)
    slices = Slices.of(ArgumentSeries((step, x._version) for step in x[1:4]))
    assert slices is not None
    assert slices.take(x[4])
    for other in (
        x[4],
        x[6],
        x[5].double(),
        x[5][:1],
        x[5].clone(),
        x[5].view(torch.int32),
        x[5].T.contiguous().T,
    ):
        assert not slices.take(other)
    assert len(slices) == 4
    assert slices.capacity() == 8
    assert torch.equal(slices.whole(), x[1:5])
    assert slices.whole().data_ptr() == x[1].data_ptr()
    assert slices[0][0] is slices.first
    assert all(torch.equal(a, b) for (a, _), b in zip(slices, x[1:5], strict=True))
    assert torch.equal(slices[-1][0], x[4])
    assert [torch.equal(a, b) for (a, _), b in zip(slices[1:3], x[2:4], strict=True)] == [True, True]
    x.add_(1)
    assert not slices.take(x[5])
    assert slices.read()[0][1] != slices.first._version


@pytest.mark.parametrize("kind", ["versions", "gradient", "no base", "backwards", "one"])
def test_what_is_no_column_of_slices(kind: str) -> None:
    x = torch.rand(5, 2)
    entries = [(step, x._version) for step in x]
    if kind == "versions":
        entries[2] = (x[2], x._version + 1)
    if kind == "gradient":
        entries = [(step, 0) for step in torch.rand(5, 2, requires_grad=True)]
    if kind == "no base":
        entries = [(step.clone(), 0) for step in x]
    if kind == "backwards":
        entries.reverse()
    if kind == "one":
        entries = entries[:1]
    assert Slices.of(ArgumentSeries(entries)) is None
